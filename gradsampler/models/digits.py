"""Networks for scikit-learn's 8x8 digits, and the loaders of their trained weights.

Both networks see images ``[B, 1, 8, 8]`` on the data scale: a pixel value p in 0..16 of
``sklearn.datasets.load_digits`` becomes ``p / 8 - 1``, so images lie in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Model = TypeVar("Model", bound=nn.Module)

CLASSES = 10
NULL_CLASS = 10
"""The label that stands for "no label"; classifier-free guidance needs it."""

NETWORK_WEIGHTS = Path(__file__).with_name("digits.safetensors")
CLASSIFIER_WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")


def to_pixels(x: Tensor) -> Tensor:
    """Map images from the data scale to grey values in [0, 1], clipping what lies outside."""
    return ((x + 1) / 2).clamp(0, 1)


def from_pixels(pixels: Tensor) -> Tensor:
    """Map grey values in [0, 1] to the data scale [-1, 1]."""
    return 2 * pixels - 1


class NoiseEmbedding(nn.Module):
    """Fourier features of ``c_noise`` followed by a linear layer: ``[B] -> [B, width]``."""

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear = nn.Linear(2 * frequencies, width)

    def forward(self, noise: Tensor) -> Tensor:
        """Embed noise ``[B]``; the result has the parameters' dtype."""
        # The features are formed in float32 or wider: bfloat16 cannot tell neighbouring
        # noise levels apart. A buffer of frequencies would be narrowed by `.bfloat16()`.
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        frequency = torch.arange(1, self.frequencies + 1, dtype=noise.dtype, device=noise.device)
        angle = noise[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        embedding: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return embedding


class ResidualBlock(nn.Module):
    """Pre-norm residual MLP block, modulated by adaptive layer norm: ``[B, width]``."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.expand = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden, width)

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Update h; scale and shift have its shape."""
        modulated = self.norm(h) * (1 + scale) + shift
        out: Tensor = h + self.contract(self.dropout(F.silu(self.expand(modulated))))
        return out


class DigitsNetwork(nn.Module):
    """The raw network F of the EDM preconditioning (Karras et al. 2022, eq. 7).

    A residual MLP over the 64 pixels; the noise level and the label enter every block by
    adaptive layer norm. Every activation is smooth, so the output is infinitely often
    differentiable in ``x`` and ``noise``.

    ``sigma_data`` is the standard deviation of the data, on the data scale, with which the
    preconditioning was trained.
    """

    def __init__(
        self,
        width: int = 192,
        hidden: int = 256,
        blocks: int = 4,
        embedding: int = 64,
        dropout: float = 0.1,
        sigma_data: float = 0.75,
    ) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.noise_embedding = NoiseEmbedding(embedding)
        self.label_embedding = nn.Embedding(CLASSES + 1, embedding)
        self.modulation = nn.Linear(embedding, 2 * blocks * width)
        self.inlet = nn.Linear(64, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, 64)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Evaluate F.

        x: ``[B, 1, 8, 8]`` in the parameters' dtype, already scaled by c_in.
        noise: ``[B]`` floating, c_noise = ln(sigma) / 4.
        label: ``[B]`` int64 in 0..10, where 10 is the null class; None means all null.
        Returns ``[B, 1, 8, 8]`` in the parameters' dtype.
        """
        embedding = F.silu(self.noise_embedding(noise) + self.embed_label(label, x))
        modulation = self.modulation(embedding).chunk(2 * len(self.blocks), dim=1)
        h = self.inlet(x.flatten(1))
        for block, scale, shift in zip(
            self.blocks, modulation[0::2], modulation[1::2], strict=True
        ):
            h = block(h, scale, shift)
        out: Tensor = self.outlet(F.silu(self.norm(h))).view_as(x)
        return out

    def embed_label(self, label: Tensor | None, x: Tensor) -> Tensor:
        """Look up the label's embedding ``[B, embedding]``."""
        if label is None:
            label = torch.full((x.shape[0],), NULL_CLASS, device=x.device)
        try:
            embedding: Tensor = self.label_embedding(label)
        except IndexError as error:
            raise ValueError(f"label must lie in 0..{NULL_CLASS}, got {label}") from error
        return embedding


class DigitsClassifier(nn.Module):
    """A smooth digit classifier: ``[B, 1, 8, 8]`` on the data scale to logits ``[B, 10]``."""

    def __init__(self, channels: int = 24, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(16 * channels, hidden),
            nn.GELU(),
            nn.Linear(hidden, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``[B, 10]`` of images ``[B, 1, 8, 8]``, in the parameters' dtype."""
        logits: Tensor = self.layers(x)
        return logits


def _fill(module: Model, path: Path) -> Model:
    """Give a module built on the meta device the stored weights, in float32, and freeze it.

    Building on the meta device draws no initial weights, so loading a model leaves the
    global random state as it was.
    """
    module.load_state_dict(load_file(path), assign=True)
    return module.float().eval().requires_grad_(False)


def load_network(path: Path = NETWORK_WEIGHTS) -> DigitsNetwork:
    """Load the trained denoiser's network: on the CPU, in float32, frozen and in eval mode."""
    with safe_open(path, framework="pt") as file:
        sigma_data = float(file.metadata()["sigma_data"])
    with torch.device("meta"):
        network = DigitsNetwork(sigma_data=sigma_data)
    return _fill(network, path)


def load_classifier(path: Path = CLASSIFIER_WEIGHTS) -> DigitsClassifier:
    """Load the trained classifier: on the CPU, in float32, frozen and in eval mode."""
    with torch.device("meta"):
        classifier = DigitsClassifier()
    return _fill(classifier, path)
