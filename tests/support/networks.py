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


class Layers(nn.Module):
    """Two blocks, each through ``around(block, x)``."""

    size = 6

    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(self.size, self.size), nn.Tanh(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.to(dtype)
        self.around = lambda block, x: block(x)

    def forward(self, x, sigma):
        for block in self.blocks:
            x = self.around(block, x)
        return x * torch.cos(sigma).to(x.dtype).view(-1, 1)
