# SPDX-License-Identifier: Apache-2.0
"""guided-diffusion's sampler, with the gradient to the noise it started from.

Replace ::

    diffusion = create_gaussian_diffusion(**options)

by ::

    diffusion = guided_diffusion.from_upstream(create_gaussian_diffusion(**options))

and the methods for sampling take the same arguments and return the same values as those of
openai/guided-diffusion (gaussian_diffusion.py, respace.py; Dhariwal and Nichol 2021,
arXiv 2105.05233), with two differences: nothing runs under torch.no_grad unless the caller puts it
there, and tables stay in float64, where upstream rounds them to float32.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsampler import _checks, schedules
from gradsampler.integrations._chain import Chain, start
from gradsampler.integrations._posterior import Table
from gradsampler.integrations._reverse import Call, Denoised, GuidanceWarning, Network
from gradsampler.iteration import Watch
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource

__all__ = [
    "GaussianDiffusion",
    "GuidanceWarning",
    "from_upstream",
    "get_named_beta_schedule",
    "space_timesteps",
]


class GaussianDiffusion(Chain):
    """A discrete diffusion and its samplers: DDPM and DDIM, with guidance and respacing.

    Models are called as model(x [B, C, *space], t [B], **model_kwargs) and return [B, C, *space],
    or [B, 2C, *space] where variances are learned; ``t`` holds int64 timesteps of the original
    process, with ``rescale_timesteps`` float32 ones between 0 and 1000.

    Args:
        betas: [T] variances, each strictly between 0 and 1, as `schedules.betas` makes them.
        model_mean_type: what the model predicts, "epsilon" | "x0" | "previous_x".
        model_var_type: "fixed_small" | "fixed_large" | "learned" | "learned_range".
        rescale_timesteps: gives the model timesteps as if the process had 1000 of them.
        use_timesteps: those to visit, as `schedules.respace` chooses them; None visits all.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, and the names that do.

    Example:
        >>> import torch, gradsampler as gs
        >>> from gradsampler.integrations.guided_diffusion import GaussianDiffusion
        >>> diffusion = GaussianDiffusion(
        ...     gs.schedules.betas("linear", 1000), use_timesteps=gs.schedules.respace(1000, "10")
        ... )
        >>> z0 = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> x = diffusion.p_sample_loop(
        ...     lambda x, t: x.tanh(), z0.shape, noise=z0, step_noise=gs.noise.SignedRoll(0)
        ... )
        >>> torch.autograd.grad(x.sum(), z0)[0].shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        betas: Tensor | Sequence[float] | Table,
        model_mean_type: object = "epsilon",
        model_var_type: object = "fixed_small",
        rescale_timesteps: bool = False,
        use_timesteps: Iterable[int] | None = None,
    ) -> None:
        super().__init__(betas, model_mean_type, model_var_type, rescale_timesteps, use_timesteps)

    def p_mean_variance(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The distribution ``p(x_{t-1} | x_t)`` that the model predicts.

        Args:
            model: see the class.
            x: [B, C, *space] state.
            t: [B] integer timesteps of this process, 0 <= t < num_timesteps.
            clip_denoised: clamps the predicted x_0 to [-1, 1].
            denoised_fn: applied to the predicted x_0, before the clamp.
            model_kwargs: passed on to the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", each [B, C, *space].

        Raises:
            ValueError, TypeError: naming the argument that does not fit.
        """
        t = self._timesteps(t, x)
        call = Call(model, clip_denoised, denoised_fn, None, model_kwargs)
        return self._moments(call, self._output(call, x, t), x, t)

    def condition_mean(
        self,
        cond_fn: Network,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """``mean + variance * cond_fn(x, t)``: Dhariwal and Nichol 2021, arXiv 2105.05233, alg. 1.

        Args:
            cond_fn: cond_fn(x, t, **model_kwargs) -> gradient [B, C, *space] of a log probability
                by x; ``t`` as the model is told it.
            p_mean_var: what `p_mean_variance` returned.
            x, t, model_kwargs: as for `p_mean_variance`.

        Returns:
            [B, C, *space], float32 at least.

        Example:
            >>> import torch
            >>> from gradsampler.integrations.guided_diffusion import GaussianDiffusion
            >>> diffusion, x = GaussianDiffusion([0.5, 0.5]), torch.ones(1, 1, 2)
            >>> moments = {"mean": 0 * x, "variance": 0.25 * x}
            >>> diffusion.condition_mean(lambda x, t: -2 * x, moments, x, torch.tensor([1]))
            tensor([[[-0.5000, -0.5000]]])
        """
        t = self._timesteps(t, x)
        gradient = self._gradient(cond_fn, model_kwargs or {}, Watch(), x, t)
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(
        self,
        cond_fn: Network,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """``epsilon - sqrt(1 - alpha_bar) cond_fn(x, t)``: arXiv 2105.05233, alg. 2.

        Args:
            cond_fn, p_mean_var, x, t, model_kwargs: as for `condition_mean`.

        Returns:
            A copy of ``p_mean_var`` with "pred_xstart" and "mean" of that score.
        """
        t = self._timesteps(t, x)
        gradient = self._gradient(cond_fn, model_kwargs or {}, Watch(), x, t)
        x0 = self._shifted(p_mean_var["pred_xstart"], t, gradient)
        return {**p_mean_var, "pred_xstart": x0, "mean": self._mean(x0, x, t)}

    def p_sample(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Network | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        step_noise: NoiseSource | None = None,
        z0: Tensor | None = None,
        memory: str | Memory | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step, from x_t to x_{t-1}; no noise at t = 0.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: as for `p_mean_variance`.
            cond_fn: guidance, as for `condition_mean`.
            step_noise: a `gradsampler.noise` object; step i = num_timesteps - 1 - t. None draws
                from torch's generator, as guided-diffusion does.
            z0: [B, C, *space] initial noise of the run, needed where the step noise depends on it.
            memory: a strategy for this one step; None is plain autograd.

        Returns:
            "sample" and "pred_xstart", each [B, C, *space].

        Raises:
            ValueError, TypeError: naming the argument that does not fit.

        Example:
            >>> import torch
            >>> from gradsampler.integrations.guided_diffusion import GaussianDiffusion
            >>> diffusion, x = GaussianDiffusion([0.5, 0.5], "x0"), torch.ones(1, 1, 2)
            >>> diffusion.p_sample(lambda x, t: 0.3 * x, x, torch.tensor([0]))["sample"]
            tensor([[[0.3000, 0.3000]]])
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._single(call, x, t, step_noise, z0, memory)

    def p_sample_loop(
        self,
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Network | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        step_noise: NoiseSource | None = None,
        memory: str | Memory = "auto",
    ) -> Tensor:
        """Samples by ancestral steps; gradients reach all that the run depends on.

        That is ``noise``, the tensors of a `noise.Given`, those in ``model_kwargs``, and the
        parameters of model, denoised_fn and cond_fn.

        Args:
            model, clip_denoised, denoised_fn, cond_fn, model_kwargs: as for `p_sample`.
            shape: [B, C, *space].
            noise: z0, of that shape; None draws it.
            device: where the sample is made; None takes the noise's, else the model's.
            progress: shows a bar.
            step_noise: a `gradsampler.noise` object, called for step i = 0 .. N-2 of N; None draws
                from torch's generator, as guided-diffusion does. Off() injects nothing.
            memory: a name of `memory.names()`, or a `gradsampler.memory` object.

        Returns:
            [B, C, *space], float32 at least.

        Raises:
            ValueError, TypeError: naming the argument that does not fit, before any model call.
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        z0 = start(model, shape, noise, device)
        return self._loop(call, z0, step_noise, memory, progress)

    def p_sample_loop_progressive(
        self,
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Network | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        step_noise: NoiseSource | None = None,
        memory: str | Memory | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yields what `p_sample` returns, step by step.

        Arguments as for `p_sample_loop`; ``memory`` is a strategy for each step on its own, so that
        backward can start from any of them. Put another "sample" in the dict to go on from that.
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        z0 = start(model, shape, noise, device)
        return self._progressive(call, z0, step_noise, memory, progress)

    def ddim_sample(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Network | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        *,
        step_noise: NoiseSource | None = None,
        z0: Tensor | None = None,
        memory: str | Memory | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step, from x_t to x_{t-1}: Song, Meng and Ermon 2021, arXiv 2010.02502, eq. 12.

        Arguments and return value as for `p_sample`; cond_fn as for `condition_score`.

        Args:
            eta: amount of noise, between 0, which is deterministic, and 1.
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, _checked_eta(eta))
        return self._single(call, x, t, step_noise, z0, memory)

    def ddim_reverse_sample(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of the deterministic DDIM the other way, from x_t to x_{t+1}.

        Arguments and return value as for `p_mean_variance` and `p_sample`; eta must be 0.
        """
        if eta != 0.0:
            _checks.fail("eta", "be 0, as only the deterministic path has a reverse", eta)
        t = self._timesteps(t, x)
        call = Call(model, clip_denoised, denoised_fn, None, model_kwargs)
        x0 = self._xstart(call, self._output(call, x, t), x, t)
        there = self.alphas_cumprod_next[t.numpy()]
        return {
            "sample": self._toward(there, np.zeros_like(there), x, x0, t, None),
            "pred_xstart": x0,
        }

    def ddim_sample_loop(
        self,
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Network | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        step_noise: NoiseSource | None = None,
        memory: str | Memory = "auto",
    ) -> Tensor:
        """Samples by DDIM steps; arguments and return value as for `p_sample_loop`.

        Args:
            eta: amount of noise, between 0, which is deterministic, and 1.

        Example:
            >>> import torch
            >>> from gradsampler.integrations.guided_diffusion import GaussianDiffusion
            >>> diffusion, z0 = GaussianDiffusion([0.5, 0.5], "x0"), torch.ones(1, 1, 2)
            >>> with torch.no_grad():
            ...     diffusion.ddim_sample_loop(lambda x, t: 0 * x + 0.3, z0.shape, noise=z0)
            tensor([[[0.3000, 0.3000]]])
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, _checked_eta(eta))
        z0 = start(model, shape, noise, device)
        return self._loop(call, z0, step_noise, memory, progress)

    def ddim_sample_loop_progressive(
        self,
        model: Network,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Network | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        step_noise: NoiseSource | None = None,
        memory: str | Memory | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yields what `ddim_sample` returns, step by step; see `p_sample_loop_progressive`."""
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, _checked_eta(eta))
        z0 = start(model, shape, noise, device)
        return self._progressive(call, z0, step_noise, memory, progress)


def _checked_eta(eta: float) -> float:
    if _checks.finite("eta", eta, 0.0) > 1:
        _checks.fail("eta", "be at most 1", eta)
    return float(eta)


def from_upstream(diffusion: Any) -> GaussianDiffusion:
    """The same process as a guided-diffusion ``GaussianDiffusion`` or ``SpacedDiffusion``.

    Args:
        diffusion: upstream's object; read, not kept.

    Raises:
        TypeError: ``diffusion`` lacks an attribute of such an object.
        ValueError: its mean or variance type is unknown.

    Example:
        >>> from types import SimpleNamespace
        >>> from gradsampler.integrations.guided_diffusion import from_upstream
        >>> upstream = SimpleNamespace(
        ...     betas=[0.5, 0.5],
        ...     model_mean_type="x0",
        ...     model_var_type="learned",
        ...     rescale_timesteps=True,
        ... )
        >>> from_upstream(upstream).num_timesteps
        2
    """
    for name in ("betas", "model_mean_type", "model_var_type", "rescale_timesteps"):
        if not hasattr(diffusion, name):
            expected = f"be a diffusion of guided-diffusion, with an attribute {name}"
            _checks.fail_type("diffusion", expected, diffusion)
    result = GaussianDiffusion(
        diffusion.betas,
        diffusion.model_mean_type,
        diffusion.model_var_type,
        diffusion.rescale_timesteps,
    )
    if hasattr(diffusion, "timestep_map"):
        # Its betas are the respaced ones already.
        result.timestep_map = [int(t) for t in diffusion.timestep_map]
        result.original_num_steps = int(diffusion.original_num_steps)
    return result


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Table:
    """`schedules.betas` under upstream's name: "linear" or "cosine", as a float64 array.

    Example:
        >>> from gradsampler.integrations.guided_diffusion import get_named_beta_schedule
        >>> get_named_beta_schedule("linear", 1000)[:1]
        array([0.0001])
    """
    betas: Table = schedules.betas(schedule_name, num_diffusion_timesteps).numpy()
    return betas


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """`schedules.respace` under upstream's name: the timesteps to visit, as a set.

    Example:
        >>> from gradsampler.integrations.guided_diffusion import space_timesteps
        >>> sorted(space_timesteps(1000, "ddim4"))
        [0, 250, 500, 750]
    """
    return set(schedules.respace(num_timesteps, section_counts))
