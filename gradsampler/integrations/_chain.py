# SPDX-License-Identifier: Apache-2.0
"""Steps of a discrete diffusion in a row, or one alone, under a memory strategy."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradsampler import _checks
from gradsampler.integrations._reverse import Call, Network, Reverse, StepNoise
from gradsampler.iteration import iterate
from gradsampler.memory import Memory
from gradsampler.noise.sources import Given, NoiseSource, Off, Philox


class Chain(Reverse):
    """The reverse process from x_T to x_0."""

    def _loop(
        self,
        call: Call,
        z0: Tensor,
        step_noise: NoiseSource | None,
        memory: str | Memory,
        progress: bool,
    ) -> Tensor:
        count = self.num_timesteps
        source = _source(step_noise, call, z0, range(count - 1))

        def step(x: Tensor, i: int, anchor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
            t = torch.full((len(x),), count - 1 - i)
            noise = StepNoise(source, anchor, count)
            filled = replace(call, model_kwargs=model_kwargs)
            return self._step(filled, x, t, noise, xstart=False)["sample"]

        cond = _cond(call, z0)
        return iterate(step, z0, count, memory=memory, cond=cond, progress=progress)

    def _progressive(
        self,
        call: Call,
        z0: Tensor,
        step_noise: NoiseSource | None,
        memory: str | Memory | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        count = self.num_timesteps
        noise = StepNoise(_source(step_noise, call, z0, range(count - 1)), z0, count)

        def steps() -> Iterator[dict[str, Tensor]]:
            x = z0
            for i in tqdm(range(count), desc="sampling", disable=not progress):
                t = torch.full((len(x),), count - 1 - i)
                out = self._remembered(call, x, t, noise, memory)
                yield out
                x = out["sample"]

        return steps()

    def _single(
        self,
        call: Call,
        x: Tensor,
        t: Tensor,
        step_noise: NoiseSource | None,
        z0: Tensor | None,
        memory: str | Memory | None,
    ) -> dict[str, Tensor]:
        t = self._timesteps(t, x)
        last = self.num_timesteps - 1
        if z0 is None:
            independent = step_noise is None or isinstance(step_noise, (Off, Philox, Given))
            if not independent and not bool((t == last).all()):
                kind = type(step_noise).__name__
                _checks.fail("z0", f"be given, as {kind} is a function of the initial noise", None)
            z0 = x
        _checks.shape("z0", _checks.floating("z0", z0), x.shape)
        steps = sorted(last - k for k in set(t.tolist()) - {0})
        source = _source(step_noise, call, _checks.device("z0", z0, x.device), steps)
        return self._remembered(call, x, t, StepNoise(source, z0, last + 1), memory)

    def _remembered(
        self, call: Call, x: Tensor, t: Tensor, noise: StepNoise, memory: str | Memory | None
    ) -> dict[str, Tensor]:
        """One step under a memory strategy."""
        if memory is None:
            return self._step(call, x, t, noise)
        channels = x.shape[1]

        # A program has one state: the prediction travels in a second half of its channels.
        def step(pair: Tensor, _: int, anchor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
            filled = replace(call, model_kwargs=model_kwargs)
            out = self._step(filled, pair[:, :channels], t, noise._replace(z0=anchor))
            return torch.cat([out["sample"], out["pred_xstart"]], dim=1)

        pair = torch.cat([x, x.detach()], dim=1)
        pair = iterate(step, pair, 1, memory=memory, cond=_cond(call, noise.z0))
        return {"sample": pair[:, :channels], "pred_xstart": pair[:, channels:]}


def start(
    model: Network, shape: Sequence[int], noise: Tensor | None, device: torch.device | str | None
) -> Tensor:
    """The initial noise of a run, checked; float32 at least."""
    if not isinstance(shape, (tuple, list)):
        _checks.fail_type("shape", "be a tuple or a list", shape)
    if noise is None:
        if device is None:
            parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
            parameter = next(parameters, None)
            if parameter is None:
                _checks.fail("device", "be given for a model without parameters", None)
            device = parameter.device
        return _checks.batched("noise", torch.randn(*shape, device=device))
    noise = _checks.shape("noise", _checks.batched("noise", noise), shape)
    return noise.to(noise.device if device is None else device, _widened(noise.dtype))


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cond(call: Call, z0: Tensor) -> dict[str, Any]:
    """What a step depends on beside the state, in the form that memory strategies know."""
    return {"anchor": z0, "model_kwargs": dict(call.kwargs)}


def _source(
    step_noise: NoiseSource | None, call: Call, z0: Tensor, steps: Sequence[int]
) -> NoiseSource | None:
    """The noise source of a run that injects at ``steps``, checked."""
    if step_noise is None:
        return None
    if not isinstance(step_noise, NoiseSource):
        _checks.fail_type("step_noise", "be a gradsampler.noise object or None", step_noise)
    if call.eta == 0:
        if not isinstance(step_noise, Off):
            kind = type(step_noise).__name__
            warnings.warn(
                f"step_noise={kind} is inert: DDIM injects nothing with eta = 0; take eta > 0",
                stacklevel=4,
            )
        return step_noise
    return step_noise.prepare(z0, [(step, 0) for step in steps]) if steps else step_noise
