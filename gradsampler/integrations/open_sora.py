# SPDX-License-Identifier: Apache-2.0
"""Open-Sora's flow matching with gradients: times and pairs to train on, and the sampling loop.

Named and called as in Open-Sora 2 (github.com/hpcaitech/Open-Sora, opensora/utils/sampling.py and
scripts/diffusion/train.py); docs/open-sora.md says which lines to replace. Latents are
[B, C, T, H, W], or packed to one token a patch, [B, N, D] with N = T*(H/p)*(W/p) and D = C*p*p.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks, flow
from gradsampler.engine.observer import StepInfo
from gradsampler.integrations import _latents
from gradsampler.integrations._latents import pack
from gradsampler.integrations._velocity import Guidance, GuidedVelocity, euler
from gradsampler.memory import Memory
from gradsampler.parameterization import Coefficient
from gradsampler.sampling import integrate

__all__ = [
    "Inputs",
    "denoise",
    "get_res_lin_function",
    "pack",
    "prepare_inputs",
    "sample_timesteps",
    "time_shift",
]

METHODS = ("i2v", "distill")


class Inputs(NamedTuple):
    """What `prepare_inputs` makes of a batch."""

    inputs: dict[str, Any]  # the network's arguments, with img, timesteps and guidance
    x0: Tensor  # [B, N, D] data, packed unless patch_size is None
    x1: Tensor  # the noise, of x0's shape
    target: Tensor  # the velocity that the network ought to return, of x0's shape


def time_shift(alpha: float | Tensor, t: Tensor) -> Tensor:
    """Flow times pushed towards the noise by the factor alpha: `flow.shift_times`.

    Args:
        alpha: above 0; 1 changes nothing.
        t: flow times in [0, 1], floating, of any shape.

    Example:
        >>> import torch
        >>> time_shift(3.0, torch.tensor([0.5, 1.0]))
        tensor([0.7500, 1.0000])
    """
    return flow.shift_times(t, alpha)


def get_res_lin_function(
    x1: float | None = None,
    y1: float = 1.0,
    x2: float | None = None,
    y2: float = 3.0,
    *,
    clamp: bool = False,
) -> Callable[[float], float]:
    """The shift for a resolution, linear from y1 at x1 to y2 at x2.

    The argument of the function is ``H * W / 4``. There are two forms. In Open-Sora's, x1 and x2
    are 256 and 4096 tokens a latent frame, and the function is linear beyond them too. With
    ``clamp=True`` they are 256^2 and 1024^2 pixels, and the shift stays between y1 and y2.

    Args:
        x1, x2: the ends, x1 below x2; None takes those above.
        y1, y2: the shifts there.
        clamp: whether the shift stays between y1 and y2.

    Returns:
        A function from ``H * W / 4`` to the shift.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> get_res_lin_function()(48 * 48 // 4)
        1.1666666666666667
        >>> clamped = get_res_lin_function(clamp=True)
        >>> clamped(640**2), clamped(2048**2)
        (1.7, 3.0)
    """
    ends = (256.0**2, 1024.0**2) if clamp else (256.0, 4096.0)
    low = ends[0] if x1 is None else _checks.finite("get_res_lin_function: x1", x1)
    high = ends[1] if x2 is None else _checks.finite("get_res_lin_function: x2", x2)
    y1 = _checks.finite("get_res_lin_function: y1", y1)
    y2 = _checks.finite("get_res_lin_function: y2", y2)
    if not high > low:
        _checks.fail("get_res_lin_function: x2", f"be above x1 = {low}", high)

    slope = (y2 - y1) / (high - low)

    def shift(x: float) -> float:
        x = _checks.finite("get_res_lin_function: the argument", x)
        if clamp:
            return y1 + (y2 - y1) * min(max((x - low) / (high - low), 0.0), 1.0)
        return slope * x + (y1 - slope * low)  # rounded as Open-Sora's

    return shift


def sample_timesteps(
    x0: Tensor,
    latent_shape: Sequence[int] | None = None,
    *,
    clamp: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Times to train at: ``sigmoid(N(0, 1))``, shifted for the resolution and the frames.

    The shift is ``get_res_lin_function(clamp=clamp)(H * W // 4) * sqrt(T)``.

    Args:
        x0: [B, C, T, H, W] latents, or [B, N, D] packed ones.
        latent_shape: (T, H, W) of the latents before packing; needed with packed ones.
        clamp: see `get_res_lin_function`.
        seed: see `flow.logit_normal`.

    Returns:
        [B] of x0's dtype.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> import torch
        >>> sample_timesteps(torch.zeros(16, 1280, 64), latent_shape=(5, 32, 32)).shape
        torch.Size([16])
    """
    frames, height, width = _latents.latent_shape("sample_timesteps", x0, latent_shape)
    shift = get_res_lin_function(clamp=clamp)(height * width // 4) * math.sqrt(frames)
    return flow.logit_normal(len(x0), shift, seed=seed, dtype=x0.dtype, device=x0.device)


def prepare_inputs(
    x0: Tensor,
    inputs: Mapping[str, Any] | None = None,
    *,
    latent_shape: Sequence[int] | None = None,
    t: Tensor | None = None,
    x1: Tensor | None = None,
    sigma_min: float = 1e-5,
    guidance: float = 4.0,
    patch_size: int | None = 2,
    clamp: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> Inputs:
    """A training batch: latents on their way to noise, with their times and the target.

    The pair is one op, `ops.flow_pair`; gradients reach x0, t and x1. Without ``seed`` the times
    and then the noise are drawn from torch's default generator, in float32, and cast.

    Args:
        x0: [B, C, T, H, W] latents, or [B, N, D] packed ones.
        inputs: the network's other arguments; the dict stays as it is.
        latent_shape: (T, H, W) of the latents before packing; needed to draw the times of packed
            ones.
        t: [B] flow times; None draws them by `sample_timesteps`.
        x1: noise of the latents' packed shape; None draws it.
        sigma_min: standard deviation left at t = 0.
        guidance: the guidance that the network gets as its input.
        patch_size: packs unpacked latents; None leaves them as they are.
        clamp: see `get_res_lin_function`.
        seed: a seed that times and noise are a function of; see `flow`.
        backend: "reference", or None for the fastest present.

    Returns:
        `Inputs`; its first three fields are those that Open-Sora's function of this name returns.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> import torch
        >>> batch, x0, x1, target = prepare_inputs(torch.zeros(16, 16, 5, 32, 32), seed=0)
        >>> batch["img"].shape, batch["timesteps"].shape, batch["guidance"].shape
        (torch.Size([16, 1280, 64]), torch.Size([16]), torch.Size([16]))
    """
    x0 = _checks.batched("prepare_inputs: x0", x0)
    guidance = _checks.finite("prepare_inputs: guidance", guidance)
    if t is None:
        t = sample_timesteps(x0, latent_shape, clamp=clamp, seed=seed)
    t = _checks.floating("prepare_inputs: t", t).to(x0.dtype)
    if x0.ndim == 5 and patch_size is not None:
        x0 = pack(x0, patch_size)
    # Given noise makes the seed one of the times alone.
    seed = seed if x1 is None else None
    pair = flow.training_pair(x0, t, x1, sigma_min=sigma_min, seed=seed, backend=backend)
    told = torch.full((len(x0),), guidance, dtype=x0.dtype, device=x0.device)
    filled = {**(inputs or {}), "img": pair.x_t, "timesteps": t, "guidance": told}
    return Inputs(filled, x0, pair.x1, pair.v)


def denoise(
    model: Callable[..., Tensor],
    *,
    img: Tensor,
    timesteps: Sequence[float] | Tensor,
    guidance: Coefficient,
    guidance_img: Coefficient | None = None,
    masks: Tensor | None = None,
    masked_ref: Tensor | None = None,
    text_osci: bool = False,
    image_osci: bool = False,
    scale_temporal_osci: bool = False,
    sigma_min: float | None = None,
    patch_size: int = 2,
    method: str | Enum = "i2v",
    memory: str | Memory = "auto",
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    backend: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """Open-Sora's sampling loop, ``img + (t_prev - t_curr) * v``, differentiable.

    With "i2v" the network is called on three copies of the state: with text and reference, with
    reference alone, with neither, and
    ``v = v_none + g_img (v_ref - v_none) + g_text (v_both - v_ref)``
    (Brooks et al. 2022, arXiv 2211.09800, eq. 3). Without ``guidance_img`` there are two, with and
    without text, and ``v = v_plain + g_text (v_text - v_plain)``; with "distill" there is one.

    Gradients reach img, the tensors in ``kwargs``, masks, masked_ref, parameters and other leaves
    of the model, and ``timesteps`` and the two guidance scales where they are tensors.

    Args:
        model: called as model(img=, timesteps=, guidance=, **kwargs), and cond= where there is a
            reference; returns a velocity of img's shape. The parameters' gradients are computed
            as well, unless they are frozen.
        img: [c*B, N, D] or [c*B, C, T, H, W] noise in c copies, of which the first is read.
        timesteps: [N+1] strictly decreasing flow times of at most 1, the last at least 0. The run
            starts from img, whatever the first is.
        guidance: scale of the text guidance, also told to the model; a float or 0-d tensor.
        guidance_img: scale of the image guidance.
        masks: [B, 1, T, H, W] which latents the reference gives; with masked_ref.
        masked_ref: [B, C, T, H, W] the reference.
        text_osci: from step 10 on, the scale is 1 at every odd step.
        image_osci: the same for the image guidance.
        scale_temporal_osci: an image guidance above 1 rises from 1 at the first frame, to a scale
            at the last that falls to 1 in the course of the run. Packed states need masked_ref,
            which tells the number of frames.
        sigma_min: taken because Open-Sora passes it; the loop does not depend on it.
        patch_size: packs masks and masked_ref where img is packed.
        method: "i2v" or "distill", or Open-Sora's SamplingMethod. With "distill" oscillation means
            nothing, as in Open-Sora.
        memory: what is kept for the gradient; this, callback, progress, check_finite and backend
            as in `sample`.
        **kwargs: passed on to the model, with rows for all copies.

    Returns:
        [B, N, D] or [B, C, T, H, W] of img's dtype. The state is float32 at least in between.

    Raises:
        TypeError, ValueError: an argument is not as above, before any call of the model.
        NonFiniteError: with ``check_finite``, naming the step and the time.

    Warns:
        GradientWarning: the model detaches.

    Example:
        >>> import torch
        >>> z = torch.ones(1, 4, 2, requires_grad=True)
        >>> txt = torch.tensor([1.0, 0.0]).view(2, 1, 1)  # with text, and without
        >>> x = denoise(
        ...     lambda img, timesteps, guidance, txt: img - txt,
        ...     img=z.repeat(2, 1, 1),
        ...     timesteps=[1.0, 0.5, 0.0],
        ...     guidance=3.0,
        ...     txt=txt,
        ... )
        >>> x[0, 0].tolist(), torch.autograd.grad(x.sum(), z)[0][0, 0].tolist()
        ([2.5, 2.5], [0.25, 0.25])
    """
    img = _checks.batched("denoise: img", img)
    levels = _levels(timesteps)
    kind = _checks.choice("denoise: method", getattr(method, "value", method), METHODS)
    if kind == "distill" and any(x is not None for x in (guidance_img, masks, masked_ref)):
        expected = "be 'i2v' with guidance_img, masks or masked_ref"
        _checks.fail("denoise: method", expected, repr(kind))
    text = _scale("denoise: guidance", guidance)
    image = None if guidance_img is None else _scale("denoise: guidance_img", guidance_img)
    copies = 1 if kind == "distill" else 2 if image is None else 3
    if len(img) % copies:
        _checks.fail("denoise: img", f"hold {copies} copies of a batch", list(img.shape))
    z0 = img[: len(img) // copies]
    cond = {"guidance": _told(text, img), **kwargs}
    if masks is not None or masked_ref is not None:
        cond["cond"] = _latents.reference(masks, masked_ref, z0, copies, patch_size)
    rising = scale_temporal_osci and image is not None and bool(image > 1)
    ramp = _latents.ramp(z0, masked_ref) if rising else None
    guided = GuidedVelocity(
        model, levels, Guidance(copies, text, image, text_osci, image_osci), ramp
    )
    return integrate(
        euler(guided, levels),
        guided,
        z0,
        memory=memory,
        cond=cond,
        callback=callback,
        progress=progress,
        backend=backend,
        check_finite=check_finite,
    )


def _levels(timesteps: Sequence[float] | Tensor) -> Tensor:
    """The flow times in float64 on the CPU, checked."""
    if not isinstance(timesteps, Tensor):
        timesteps = torch.tensor(
            [_checks.finite(f"denoise: timesteps[{i}]", t) for i, t in enumerate(timesteps)],
            dtype=torch.float64,
        )
    levels = _checks.floating("denoise: timesteps", timesteps).to("cpu", torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        _checks.fail("denoise: timesteps", "have shape [N+1] with N >= 1", list(levels.shape))
    times: list[float] = levels.tolist()
    falls = all(s > t for s, t in pairwise(times))
    # Open-Sora shifts its times in float32, which may round the first to just above 1.
    if not (falls and times[0] <= 1 + 1e-6 and times[-1] >= 0):
        _checks.fail("denoise: timesteps", "decrease strictly within [0, 1]", times)
    return levels


def _scale(argument: str, scale: Coefficient) -> Coefficient:
    if not isinstance(scale, Tensor):
        return _checks.finite(argument, scale)
    return _checks.shape(argument, _checks.floating(argument, scale), ()).to("cpu", torch.float64)


def _told(guidance: Coefficient, img: Tensor) -> Tensor:
    """What the model is told of the guidance, [c*B]."""
    return torch.as_tensor(guidance, dtype=torch.float64).to(img).repeat(len(img))
