# SPDX-License-Identifier: Apache-2.0
"""Video latents [B, C, T, H, W], and packed to one token a patch: [B, T*(H/p)*(W/p), C*p*p]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsampler import _checks


def pack(x: Tensor, patch_size: int = 2) -> Tensor:
    """Latents as tokens: [B, C, T, H, W] to [B, T*(H/p)*(W/p), C*p*p], p = patch_size.

    Example:
        >>> import torch
        >>> pack(torch.zeros(16, 16, 5, 32, 32)).shape
        torch.Size([16, 1280, 64])
    """
    p = _checks.integer("pack: patch_size", patch_size, 1)
    x = _checks.floating("pack: x", x)
    if x.ndim != 5 or x.shape[3] % p or x.shape[4] % p:
        expected = f"have shape [B, C, T, H, W] with H and W multiples of {p}"
        _checks.fail("pack: x", expected, list(x.shape))
    b, c, t, h, w = x.shape
    patches = x.reshape(b, c, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
    return patches.reshape(b, t * (h // p) * (w // p), c * p * p)


def latent_shape(
    owner: str, x0: Tensor, latent_shape: Sequence[int] | None
) -> tuple[int, int, int]:
    """(T, H, W) of the latents, checked against x0."""
    x0 = _checks.batched(f"{owner}: x0", x0)
    if x0.ndim not in (3, 5):
        _checks.fail(f"{owner}: x0", "have shape [B, C, T, H, W] or [B, N, D]", list(x0.shape))
    if latent_shape is None:
        if x0.ndim == 3:
            _checks.fail(f"{owner}: latent_shape", "be given with packed latents", None)
        latent_shape = x0.shape[-3:]
    if len(latent_shape) != 3:
        _checks.fail(f"{owner}: latent_shape", "be (T, H, W)", latent_shape)
    t, h, w = (
        _checks.integer(f"{owner}: latent_shape[{k}]", n, 1) for k, n in enumerate(latent_shape)
    )
    fits = (t, h, w) == tuple(x0.shape[-3:]) if x0.ndim == 5 else (t * h * w) % x0.shape[1] == 0
    if not fits:
        _checks.fail(f"{owner}: latent_shape", f"fit x0 of {list(x0.shape)}", tuple(latent_shape))
    return t, h, w


def reference(
    masks: Tensor | None, masked_ref: Tensor | None, z0: Tensor, copies: int, patch_size: int
) -> Tensor:
    """The reference as the model is given it, none for the copy that has neither."""
    if masks is None or masked_ref is None:
        missing, given = ("masks", "masked_ref") if masks is None else ("masked_ref", "masks")
        _checks.fail(f"denoise: {missing}", f"be given with {given}", None)
    if masked_ref.ndim != 5 or len(masked_ref) != len(z0):
        expected = f"have shape [{len(z0)}, C, T, H, W]"
        _checks.fail("denoise: masked_ref", expected, list(masked_ref.shape))
    _checks.shape("denoise: masks", masks, (len(z0), 1, *masked_ref.shape[2:]))
    both = torch.cat((masks, masked_ref), dim=1)
    if z0.ndim == 5:
        _checks.shape("denoise: masked_ref", masked_ref, z0.shape)
    else:
        both = pack(both, patch_size)
        if z0.ndim != 3 or both.shape[1] != z0.shape[1]:
            expected = f"hold [B, {both.shape[1]}, D] as masked_ref does"
            _checks.fail("denoise: img", expected, list(z0.shape))
    return torch.cat([both, both, torch.zeros_like(both)][:copies])


def ramp(z0: Tensor, masked_ref: Tensor | None) -> Tensor:
    """Weights from 0 at the first frame to 1 at the last, in the shape that multiplies z0."""
    if z0.ndim == 5:
        return _even(z0.shape[2], z0.device).view(1, 1, -1, 1, 1)
    if masked_ref is None:
        _checks.fail("denoise: masked_ref", "be given with scale_temporal_osci", None)
    frames = masked_ref.shape[2]
    return _even(frames, z0.device).repeat_interleave(z0.shape[1] // frames).view(1, -1, 1)


def _even(frames: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, frames, dtype=torch.float64, device=device)
