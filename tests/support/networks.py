# SPDX-License-Identifier: Apache-2.0
"""Networks that are small, smooth and deterministic."""

import torch
from torch import nn


class Net(nn.Module):
    """A small smooth network that uses its state, its level, its conditioning, and parameters."""

    def __init__(self, size=3, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        draw = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter((0.5 * draw + torch.eye(size, dtype=torch.float64)).to(dtype))
        self.bias = nn.Parameter(torch.linspace(-0.3, 0.4, size, dtype=dtype))

    def forward(self, x, sigma, shift=None):
        column = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        hidden = torch.tanh(x @ self.weight / (1 + 0.3 * column) + self.bias)
        return hidden * torch.cos(0.4 * column) + (0 if shift is None else 0.4 * shift * x.sin())
