# SPDX-License-Identifier: Apache-2.0
"""A decoder called so that its activations do not take more than there is room for."""

from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.decoding.blocks import blocks, blockwise
from gradsampler.decoding.halo import Piece, exact_tiles
from gradsampler.memory import capacity
from gradsampler.memory.saved import Saved
from gradsampler.repetition import RandomState

__all__ = ["decode", "fits", "kept"]

_USED = 0.5  # of what is free that the activations of a decode may take
_CROP = 8  # pixels of a latent that is decoded to see what a decode takes


def decode(
    module: nn.Module, latents: Tensor, *, memory: str = "auto", tile: int = 64, **kwargs: Any
) -> Any:
    """``module(latents, **kwargs)`` with a bound on the activations that are kept for backward.

    Args:
        module: a decoder; it is not changed.
        latents: [B, C, *state].
        memory: "store" keeps all activations. "blocks" keeps the input of each block and recomputes
            the rest, one block at a time; the result is the same bit for bit. "halo" computes tile
            by tile, with overlaps (halos), and with group normalisations over the whole image. It
            keeps the activations of one tile, and the result is the same up to rounding. It takes
            an `nn.Sequential` of convolutions of stride 1, group normalisations, upsampling and
            pointwise layers. "auto" is store where that fits, else blocks.
        tile: size of a tile of "halo" without its halo, in pixels of ``latents``.
        **kwargs: passed on to the module.

    Returns:
        What the module returns. Gradients reach latents and parameters.

    Raises:
        ValueError: naming the argument, or the layer for which there is no halo.

    Example:
        >>> import torch, gradsampler as gs
        >>> decoder = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.SiLU())
        >>> latents = torch.zeros(1, 4, 8, 8, requires_grad=True)
        >>> gs.decode(decoder, latents, memory="blocks").shape
        torch.Size([1, 8, 8, 8])
    """
    _checks.batched("latents", latents)
    memory = _checks.choice("memory", memory, ("auto", "blocks", "halo", "store"))
    if memory == "halo":
        if not isinstance(module, nn.Sequential) or kwargs:
            _checks.fail_type("module", "be an nn.Sequential with memory='halo'", module)
        pieces = [Piece(name, part) for name, part in module.named_children()]
        return exact_tiles(pieces, latents, _checks.integer("tile", tile, 1))
    if memory == "auto" and torch.is_grad_enabled() and any(True for _ in blocks(module)):
        memory = "store" if fits(module, latents, **kwargs) else "blocks"
    return (blockwise(module) if memory == "blocks" else module)(latents, **kwargs)


def fits(decoder: Any, latents: Tensor, **kwargs: Any) -> bool:
    """Whether there is room for all activations of a decode.

    A corner of the latents is decoded to see what autograd keeps; the whole is taken to keep as
    much a pixel.
    """
    free = capacity.free(latents.device)
    if free is None:
        return False
    corner = latents.detach()[:1]
    for axis in range(max(2, corner.ndim - 2), corner.ndim):
        corner = corner.narrow(axis, 0, min(_CROP, corner.shape[axis]))
    size = kept(decoder, corner, **kwargs)
    return size * (latents.numel() / corner.numel()) <= _USED * free


def kept(decoder: Any, latents: Tensor, **kwargs: Any) -> int:
    """Bytes that autograd keeps of a decode, parameters aside. Draws nothing."""
    before = RandomState(latents.device)
    with torch.enable_grad(), Saved([]) as saved:
        decoder(latents.clone().requires_grad_(), **kwargs)
    before.restore()
    return saved.beside([])
