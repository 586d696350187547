# SPDX-License-Identifier: Apache-2.0
"""The digits that neither of the shipped networks was trained on."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 8, 8] in [-1, 1] and their classes [count]; at most 360."""
    data = load_digits()
    split = {"stratify": data.target, "random_state": 0, "test_size": 360}
    _, images, _, labels = train_test_split(data.images, data.target, **split)
    pixels = torch.as_tensor(images[:count], dtype=torch.float32)
    return pixels[:, None] / 8 - 1, torch.as_tensor(labels[:count])
