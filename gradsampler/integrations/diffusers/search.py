# SPDX-License-Identifier: Apache-2.0
"""Noise optimisation of a pipeline for a reward of its images."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.integrations.diffusers import ways
from gradsampler.integrations.diffusers.pictures import Pictures
from gradsampler.integrations.diffusers.rehearsal import bound, mocked
from gradsampler.integrations.diffusers.session import Session
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource
from gradsampler.optimization.descent import OptimizeResult, descend
from gradsampler.rewards import Reward

__all__ = ["optimize", "start"]


class _Begun(BaseException):
    """Leaves a pipeline at its first step, with the state."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


def start(pipe: Any, **arguments: Any) -> Tensor:
    """The standard normal noise that a call of a pipeline begins with.

    Args:
        pipe: a `diffusers.DiffusionPipeline`, whose denoisers are not called.
        **arguments: of the call; its generator is drawn from.

    Returns:
        The noise as ``latents=`` takes it.
    """
    begun, session = _begun(pipe, arguments)
    drawn = session.noise(sum(x.numel() for x in session.drawn)) if session.drawn else None
    # Some pipelines take latents in the form in which they draw them, some in that of their state.
    for candidate in (drawn, session.z0(begun)):
        if candidate is None:
            continue
        try:
            again, _ = _begun(pipe, {**arguments, "generator": None, "latents": candidate})
        except (ValueError, RuntimeError):
            continue
        if again.shape == begun.shape and torch.allclose(again, begun, rtol=1e-4, atol=1e-6):
            return candidate.detach().clone()
    _checks.fail("latents", f"be given for {type(pipe).__name__}", "None")


def _begun(pipe: Any, arguments: dict[str, Any]) -> tuple[Tensor, Session]:
    """The state that a call's first step begins with."""
    session = Session(pipe, arguments)
    session.model = mocked()

    def step(own: Any, *args: Any, **kwargs: Any) -> Any:
        raise _Begun(bound(own, args, kwargs)["sample"])

    session.step = step
    try:
        with torch.no_grad(), session.glue, session.glue.drawing(session.started):
            session.call(session.pipe, **session.arguments)
    except _Begun as begun:
        return begun.state, session
    finally:
        session.close()
    _checks.fail("pipe", "step its scheduler", type(pipe).__name__)


def optimize(
    pipe: Any,
    reward: Reward,
    *,
    latents: Tensor | None = None,
    steps: int = 50,
    lr: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    regularizer: Callable[[Tensor], Tensor] | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
    grad_clip: float | None = None,
    memory: str | Memory = "auto",
    method: str = "auto",
    decode: str = "auto",
    noise: NoiseSource | None = None,
    pictures: str | os.PathLike[str] | None = None,
    every: int = 10,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, str] | None = None,
    progress: bool = True,
    check_finite: bool = True,
    generator: Any = None,
    **arguments: Any,
) -> OptimizeResult:
    """Optimises the initial noise for a reward of a pipeline's images.

    The pipeline's weights are frozen during the call.

    Args:
        pipe: a `diffusers.DiffusionPipeline`.
        reward: from images [B, 3, H, W] in [0, 1], as the pipeline's ``output_type="pt"`` gives
            them, to scores [B] or a scalar; their mean is maximised.
        latents: the noise to begin with; None is what the pipeline draws.
        steps: updates of the noise.
        lr: learning rate.
        optimizer: called as optimizer([latents], lr=lr).
        regularizer: from the noise to a scalar penalty, such as `gradsampler.regularizers.ChiNorm`.
        projection: from the noise to that of the next step, such as `regularizers.Sphere`.
        grad_clip: largest norm of the gradient.
        memory, method: as for `pipeline`.
        decode: as the `memory` of `decode`.
        noise: replaces what the scheduler draws. If it is None, each run of the optimisation
            begins with the same state of ``generator``.
        pictures: a folder that gets the images of every ``every``-th step, as PNG.
        checkpoint: a file saved after each step, from which a second call continues.
        identity: further facts that the file's run must agree in, such as a name for the reward.
        progress: shows a bar.
        check_finite: stops before a NaN or an infinity reaches the noise.
        generator: as for the pipeline.
        **arguments: of the pipeline's call, such as ``prompt`` or ``num_inference_steps``.

    Returns:
        The noise, its images, and the history; ``history[k].loss`` is the reward before update k.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    _checks.integer("every", every, 1)
    folder = None if pictures is None else Pictures(pictures, every)
    quiet = copy.copy(pipe)
    quiet.__dict__["_progress_bar_config"] = {"disable": True}
    if latents is None:
        latents = start(quiet, generator=generator, **arguments)
    seeded = _States(generator)
    run = ways.pipeline(quiet, memory, method)

    def images(z: Tensor) -> Tensor:
        seeded.rewind()
        call = {**arguments, "output_type": "pt", "generator": generator}
        result: Tensor = run(**call, latents=z, noise=noise, decode=decode)
        return result

    def value(x: Tensor) -> Tensor:
        return reward(x).mean()

    settings = {
        "pipeline": type(pipe).__name__,
        "scheduler": dict(pipe.scheduler.config),
        "modules": {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)},
        "arguments": arguments,
        "noise": noise,
    }
    with _frozen(pipe):
        return descend(
            images,
            latents.detach().requires_grad_(),
            value,
            settings,
            steps=steps,
            lr=lr,
            optimizer=optimizer,
            maximize=True,
            regularizer=regularizer,
            projection=projection,
            grad_clip=grad_clip,
            checkpoint=checkpoint,
            identity=identity,
            progress=progress,
            check_finite=check_finite,
            watch=folder,
        )


class _States:
    """Puts generators back to where they were, so that each run draws the same."""

    def __init__(self, generator: Any) -> None:
        given = generator if isinstance(generator, list) else [generator]
        self._generators = [g for g in given if g is not None]
        self._states = [g.get_state() for g in self._generators]

    def rewind(self) -> None:
        """Puts them back."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    """Has no parameter of a pipeline require a gradient, in a with statement."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    learned = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
