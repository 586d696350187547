# SPDX-License-Identifier: Apache-2.0
"""The pipeline's own loop under autograd, in which only the models' activations are recomputed."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsampler import _checks
from gradsampler.engine.agreement import Agreement
from gradsampler.engine.recomputation import recomputed
from gradsampler.integrations.diffusers import decoding
from gradsampler.integrations.diffusers.draws import replaced
from gradsampler.integrations.diffusers.networks import unwrapped
from gradsampler.integrations.diffusers.rehearsal import bound
from gradsampler.integrations.diffusers.session import Session
from gradsampler.memory import Auto, Checkpoint, Memory, Store, capacity, resolve
from gradsampler.memory.saved import Saved
from gradsampler.noise.sources import NoiseSource

__all__ = ["run"]

_USED = 0.8  # of what is free; the rest is for what follows the run, and for fragments


def run(session: Session, memory: str | Memory, noise: NoiseSource | None) -> Any:
    """Calls the pipeline as it is; what it returns, connected for autograd.

    Args:
        session: the call.
        noise: takes the place of the scheduler's draws; None keeps them.
        memory: "store" keeps the activations of all model calls, "checkpoint" those of none, and
            "auto" those of the first calls, as many as there is room for.
    """
    strategy = resolve(memory)
    if isinstance(strategy, Auto):
        session.model = _Kept(session, strategy)
    elif isinstance(strategy, Checkpoint):
        session.model = partial(_recomputed, agreement=session.agreement)
    elif not isinstance(strategy, Store):
        _checks.fail(
            "memory",
            'be "auto", "checkpoint" or "store" where the pipeline runs its own loop',
            repr(memory),
            "method='steps' or 'program' runs every strategy where it can be had",
        )
    if noise is not None:
        session.step = _Replaced(session, noise)
    with session.glue, session.glue.drawing(session.started):
        return session.call(session.pipe, **session.arguments)


class _Replaced:
    """Steps of a scheduler that draw from a source of noise."""

    def __init__(self, session: Session, noise: NoiseSource) -> None:
        self._session, self._noise = session, noise
        self._z0: Tensor | None = None
        self._step = 0

    def __call__(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        (scheduler,), arguments = own.args, bound(own, args, kwargs)
        if self._z0 is None:
            self._z0 = self._session.z0(arguments["sample"])
        i, count = self._step, len(scheduler.timesteps)
        self._step += 1
        return replaced(self._session.glue, own, arguments, self._noise, self._z0, i, count)


def _recomputed(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], agreement: Agreement
) -> Any:
    return recomputed(
        module, args, kwargs, name=type(unwrapped(module)).__name__, agreement=agreement
    )


class _Kept:
    """Keeps the first calls whole, as many as fit into what is free; the others are recomputed.

    How much autograd keeps of a call is seen when a module is called for the first time. How many
    calls there will be is not known, so the last ones, which a run of ours would keep, cannot be
    told.
    """

    def __init__(self, session: Session, strategy: Auto) -> None:
        if callable(strategy.after):
            _checks.fail("Auto: after", "be bytes where the pipeline runs its own loop", "a loss")
        self._session, self._after = session, strategy.after
        self._agreement = session.agreement
        self._sizes: dict[int, int] = {}  # by module, bytes of one call's graph
        self._room: float | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return module(*args, **kwargs)
        if self._room is None:
            free = capacity.free(_device(module))
            self._room = _USED * (free - self._reserved(args, kwargs)) if free is not None else 0.0
        size = self._sizes.get(id(module))
        if size is None:
            with Saved(module.buffers()) as saved:
                result = module(*args, **kwargs)
            self._sizes[id(module)] = size = int(self._agreement.largest(saved.beside([])))
            # The backward of a recomputed call takes as much again.
            self._room -= 2 * size
            (self._room,) = self._agreement.least(self._room)
            return result
        if size <= self._room:
            self._room -= size
            return module(*args, **kwargs)
        return _recomputed(module, args, kwargs, self._agreement)

    def _reserved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Bytes for what follows the run: the caller's number, or what a decode keeps."""
        if self._after is not None:
            return capacity.parsed("Auto: after", self._after)
        vae, given = self._session.decodes, pytree.tree_leaves((args, kwargs))
        states = [x for x in given if isinstance(x, Tensor) and x.dtype.is_floating_point]
        if vae is None or not states:
            return 0
        largest = max(states, key=Tensor.numel)
        return decoding.reserve(vae, largest.numel(), largest)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
