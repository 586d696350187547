# SPDX-License-Identifier: Apache-2.0
"""The autoencoders of diffusers, their decoders in bounded memory."""

from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.decoding import blocks
from gradsampler.decoding.decode import fits, kept
from gradsampler.decoding.halo import Piece, exact_tiles
from gradsampler.engine.substitution import replanted
from gradsampler.memory import capacity

__all__ = ["MEMORIES", "decode"]

MEMORIES = ("auto", "blocks", "frames", "halo", "store", "tiles")


def decode(
    vae: Any, latents: Tensor, *args: Any, memory: str = "auto", tile: int = 128, **kwargs: Any
) -> Tensor:
    """``vae.decode(latents)`` with a bound on the activations that are kept for backward.

    Args:
        vae: an autoencoder of diffusers; it is not changed.
        latents: as `vae.decode` takes them, which is not scaled as a pipeline's latents are.
        *args, **kwargs: passed on to `vae.decode`.
        memory:
            - "store" keeps all activations.
            - "blocks" keeps the input of each block and recomputes the rest, one block at a
              time. The result is the same bit for bit.
            - "frames" is for video decoders that work on chunks of frames and pass features from
              one chunk to the next. It keeps these features, and decodes each chunk again in
              backward. The result is the same bit for bit.
            - "tiles" is `vae.tiled_decode`, tile by tile: **another function** than the whole
              decode, because its tiles are independent of one another; its gradient is exact.
            - "halo" decodes by overlapping tiles, with group normalisations over the whole image
              and attention in the middle undivided. It keeps the activations of one tile and needs
              a pass for each normalisation. The result is the same up to rounding.
            - "auto" is store where that fits, else frames for videos and blocks for images.
        tile: size of a tile of "halo", in pixels of the image; "tiles" takes the vae's own.

    Returns:
        The images [B, 3, H, W], or videos [B, 3, F, H, W], as `vae.decode` gives them. Gradients
        reach latents and parameters.

    Raises:
        ValueError: naming the argument, or the layer for which there is no halo.
    """
    memory = _checks.choice("memory", memory, MEMORIES)
    _checks.floating("latents", latents)
    if memory == "auto":
        memory = _chosen(vae, latents, *args, **kwargs)
    if memory == "halo":
        return _by_halos(vae, latents, tile)
    part: Any = vae
    if memory == "blocks":
        part = blocks.blockwise(vae)
    elif memory == "frames":
        _check_frames(latents)
        part = replanted(vae, {vae.decoder: _blockwise_call})
    elif memory == "tiles":
        part = replanted(vae, {vae.decoder: blocks.call})
        if not hasattr(part, "tiled_decode"):
            _checks.fail("memory", "be other than 'tiles' for an autoencoder without", type(vae))
        result = part.tiled_decode(latents, *args, **{**kwargs, "return_dict": False})
        return result[0]
    result = part.decode(latents, *args, **{**kwargs, "return_dict": False})
    return result[0]


def _chosen(vae: Any, latents: Tensor, *args: Any, **kwargs: Any) -> str:
    def whole(corner: Tensor) -> Any:
        return vae.decode(corner, *args, **{**kwargs, "return_dict": False})

    if not torch.is_grad_enabled() or fits(whole, latents):
        return "store"
    return "frames" if latents.ndim == 5 else "blocks"


def reserve(vae: Any, elements: int, like: Tensor) -> int:
    """Bytes to leave for a decode: what it keeps as a whole, at most half of what is free.

    Args:
        vae: an autoencoder.
        elements: of the latents.
        like: of their dtype and device.
    """
    free = capacity.free(like.device)
    channels = getattr(vae.config, "latent_channels", getattr(vae.config, "z_dim", None))
    if free is None or channels is None:
        return 0
    video = any(isinstance(each, nn.Conv3d) for each in vae.modules())
    shape = (1, channels, 1, 8, 8) if video else (1, channels, 8, 8)
    corner = torch.zeros(shape, dtype=like.dtype, device=like.device)
    size = kept(lambda x: vae.decode(x, return_dict=False), corner)
    return min(free // 2, size * elements // corner.numel())


def _check_frames(latents: Tensor) -> None:
    if latents.ndim != 5:
        _checks.fail("memory", "be other than 'frames' for images", list(latents.shape))


def _blockwise_call(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return blocks.call(blocks.blockwise(decoder), *args, **kwargs)


class _Plain(nn.Module):
    """A residual block without a timestep."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x, None)
        return result


def _by_halos(vae: Any, latents: Tensor, tile: int) -> Tensor:
    """The decoder of `AutoencoderKL`: its middle as a whole, what magnifies by tiles."""
    decoder: Any = getattr(vae, "decoder", None)
    parts = ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
    if latents.ndim != 4 or not all(hasattr(decoder, part) for part in parts):
        _checks.fail(
            "memory",
            "be other than 'halo' for an autoencoder whose decoder is not that of AutoencoderKL",
            type(vae).__name__,
            "'blocks' and 'frames' take any",
        )
    _checks.integer("tile", tile, 1)
    x = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    x = blocks.blockwise(decoder.mid_block)(decoder.conv_in(x))
    units = _units(decoder)
    for k, unit in enumerate(units):  # the first one magnifies nothing, each other one twice
        below = 2 ** (len(units) - max(1, k))
        x = exact_tiles(unit, x, max(8, tile // below))
    return x


def _units(decoder: Any) -> list[list[Piece]]:
    """The up-blocks, each with the magnification before it: what enters one is small."""
    units: list[list[Piece]] = [[]]
    for i, block in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{i}"
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for j, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            units[-1].append(Piece(f"{name}.resnets.{j}", _Plain(resnet)))
            if attention is not None:
                units[-1].append(Piece(f"{name}.attentions.{j}", attention))
        for j, upsampler in enumerate(block.upsamplers or ()):
            units.append([Piece(f"{name}.upsamplers.{j}", upsampler)])
    for name in ("conv_norm_out", "conv_act", "conv_out"):
        units[-1].append(Piece(f"decoder.{name}", getattr(decoder, name)))
    return units
