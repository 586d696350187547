# SPDX-License-Identifier: Apache-2.0
"""Rewards of images: callables from images in [0, 1] to one number a sample.

Any function of that kind is a reward. Those here wrap networks that you have, usually of
transformers, with differentiable preprocessing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from gradsampler import _checks

__all__ = ["Aesthetic", "CLIPScore", "Reward", "Weighted", "preprocessed"]

# Of CLIP's training images (Radford et al. 2021, arXiv 2103.00020).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@runtime_checkable
class Reward(Protocol):
    """What a reward is: larger is better."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B] or a scalar, of images [B, 3, H, W] in [0, 1]."""


def preprocessed(
    images: Tensor,
    size: int,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
) -> Tensor:
    """Images as CLIP takes them: the shorter side resized, the middle cut out, normalised.

    Args:
        images: [B, 3, H, W] in [0, 1].
        size: pixels of a side of the result.
        mean, std: of each colour in the training images.

    Returns:
        [B, 3, size, size].

    Example:
        >>> import torch
        >>> preprocessed(torch.rand(2, 3, 40, 30), 16).shape
        torch.Size([2, 3, 16, 16])
    """
    images = _images(images)
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    resized = nn.functional.interpolate(
        images, shape, mode="bicubic", antialias=True, align_corners=False
    )
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    cut = resized[..., top : top + size, left : left + size]
    column = (1, 3, 1, 1)
    return (cut - cut.new_tensor(mean).view(column)) / cut.new_tensor(std).view(column)


@dataclass(frozen=True)
class CLIPScore:
    """The cosine of image and text in CLIP's space (Hessel et al. 2021, arXiv 2104.08718).

    Args:
        model: a `transformers.CLIPModel` or what has its methods, in evaluation mode; its
            parameters are best frozen.
        tokens: what its tokenizer gives for the prompts: ``input_ids`` [B, L] or [1, L], and
            ``attention_mask``.
        size: pixels of a side that the model takes; None asks its configuration.
        scale: of the cosine.
    """

    model: Any
    tokens: Mapping[str, Tensor]
    size: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("CLIPScore: scale", self.scale)
        if "input_ids" not in self.tokens:
            _checks.fail("CLIPScore: tokens", "hold input_ids", sorted(self.tokens))

    def __call__(self, images: Tensor) -> Tensor:
        """The scores [B] of images [B, 3, H, W] in [0, 1]."""
        size = self.size or self.model.config.vision_config.image_size
        image = embedded(self.model, preprocessed(images, size))
        text = _normalised(_pooled(self.model.get_text_features(**self.tokens)))
        return self.scale * (image * text).sum(-1)


@dataclass(frozen=True)
class Aesthetic:
    """A score read off CLIP's image embedding, as LAION's aesthetic predictor does.

    Args:
        model: a `transformers.CLIPModel`, or a `CLIPVisionModelWithProjection`.
        head: from normalised embeddings [B, D] to [B, 1] or [B].
        size: pixels of a side that the model takes; None asks its configuration.
    """

    model: Any
    head: nn.Module
    size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The scores [B] of images [B, 3, H, W] in [0, 1]."""
        config = self.model.config
        size = self.size or getattr(config, "vision_config", config).image_size
        score: Tensor = self.head(embedded(self.model, preprocessed(images, size)))
        return score.reshape(len(images))


@dataclass(frozen=True)
class Weighted:
    """A sum of rewards with weights.

    Example:
        >>> import torch, gradsampler as gs
        >>> bright = lambda images: images.mean((1, 2, 3))
        >>> even = lambda images: -images.std((1, 2, 3))
        >>> reward = gs.rewards.Weighted([(bright, 1.0), (even, 0.5)])
        >>> reward(torch.full((2, 3, 4, 4), 0.25))
        tensor([0.2500, 0.2500])
    """

    parts: Sequence[tuple[Reward, float]]

    def __post_init__(self) -> None:
        if not self.parts:
            _checks.fail("Weighted: parts", "hold at least one reward", "none")
        for k, (reward, weight) in enumerate(self.parts):
            if not callable(reward):
                _checks.fail_type(f"Weighted: parts[{k}]", "begin with a callable", reward)
            _checks.finite(f"Weighted: parts[{k}]: the weight", weight)

    def __call__(self, images: Tensor) -> Tensor:
        """The scores [B] of images [B, 3, H, W] in [0, 1]."""
        total: Tensor | float = 0.0
        for reward, weight in self.parts:
            total = total + weight * reward(images)
        assert isinstance(total, Tensor)
        return total


def embedded(model: Any, pixels: Tensor) -> Tensor:
    """The normalised image embeddings [B, D] of a CLIP model."""
    if hasattr(model, "get_image_features"):
        return _normalised(_pooled(model.get_image_features(pixel_values=pixels)))
    return _normalised(model(pixel_values=pixels).image_embeds)


def _pooled(features: Any) -> Tensor:
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _images(images: object) -> Tensor:
    """Checks what a reward is called with."""
    images = _checks.floating("images", images)
    if images.ndim != 4 or images.shape[1] != 3:
        _checks.fail("images", "have shape [B, 3, H, W]", list(images.shape))
    return images
