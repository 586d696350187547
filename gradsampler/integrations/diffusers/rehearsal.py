# SPDX-License-Identifier: Apache-2.0
"""A dry run of a pipeline's loop: what each turn asks of the scheduler, found without the model.

The models return random numbers of the right shape, so values tell tensors apart: the state that a
step gets is the very tensor that the step before returned, or the pipeline changed it in between.
Nothing is drawn from the caller's generators.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsampler.integrations.diffusers import parts
from gradsampler.integrations.diffusers.loop import Head, Loop, Names
from gradsampler.integrations.diffusers.networks import unwrapped
from gradsampler.integrations.diffusers.session import Outputs, Session
from gradsampler.repetition import RandomState

__all__ = [
    "Draw",
    "Refused",
    "Rehearsal",
    "StepCall",
    "Turn",
    "bound",
    "mocked",
    "rehearse",
    "same",
    "tensors",
]


class Refused(Exception):
    """Why a pipeline cannot go a way."""


class Draw(NamedTuple):
    """Standard normal noise that a scheduler draws, as `randn_tensor` of diffusers takes it."""

    shape: tuple[int, ...]
    generator: Any  # a torch.Generator, a list of them, one a sample, or None
    device: torch.device | None
    dtype: torch.dtype | None


@dataclass
class StepCall:
    """One call of ``scheduler.step``."""

    attributes: dict[str, Any]  # plain numbers of the scheduler before the call
    arguments: dict[str, Any]  # by parameter; tensors of a run are values of the dry run
    returned: list[Tensor]
    draws: list[Draw] = field(default_factory=list)


@dataclass
class Turn:
    """One turn of the loop."""

    item: Any
    names: Names  # bound before it
    scheduler: dict[str, Any]  # its attributes before it
    calls: list[StepCall] = field(default_factory=list)

    @property
    def draws(self) -> list[Draw]:
        """All draws of its steps."""
        return [draw for call in self.calls for draw in call.draws]


@dataclass
class Rehearsal:
    """All turns, and what is bound after the last."""

    turns: list[Turn]
    names: Names
    scheduler: dict[str, Any]

    @property
    def first(self) -> Tensor | None:
        """The state before the first turn, where the pipeline names it."""
        first = self.turns[0]
        sample = first.calls[-1].arguments.get("sample") if first.calls else None
        for x in first.names.values():
            if isinstance(x, Tensor) and isinstance(sample, Tensor) and same(x, sample):
                return x
        return None

    @property
    def start(self) -> Tensor:
        """The state before the first turn."""
        if self.first is None:
            raise Refused("its first step does not begin with a tensor that the pipeline names")
        return self.first


def rehearse(session: Session, loop: Loop, head: Head) -> Rehearsal:
    """Runs the loop dry. Everything is afterwards as before.

    Raises:
        Refused: where a turn cannot be run on its own, or not without the models.
    """
    attributes, scheduler = dict(vars(session.pipe)), session.scheduler
    device = next((x.device for x in head.names.values() if isinstance(x, Tensor)), None)
    random = RandomState(device or torch.device("cpu"))
    model = session.model
    session.live, error = False, None
    try:
        for guess in (True, False):  # where the shape of an output is guessed wrong, it is seen
            session.scheduler = parts.copied(scheduler)
            session.model = _Mock(guess)
            try:
                with torch.no_grad(), session.glue:
                    return _turns(session, loop, head)
            except Exception as failed:
                error = failed
        raise Refused(f"a dry run of its loop fails with {type(error).__name__}: {error}")
    finally:
        session.live, session.step, session.model = True, None, model
        session.pipe.__dict__.clear()
        session.pipe.__dict__.update(attributes)
        random.restore()


def _turns(session: Session, loop: Loop, head: Head) -> Rehearsal:
    turns: list[Turn] = []
    names = head.names
    for item in head.items:
        turns.append(Turn(item, names, parts.snapshot(session.scheduler)))
        session.step = _recorder(session, turns[-1])
        with session.glue.drawing(_zeros):
            after = loop.turn(names, item)
        names = {name: after[name] for name in names if name in after}
    return Rehearsal(turns, after, parts.snapshot(session.scheduler))


def _recorder(session: Session, turn: Turn) -> Callable[..., Any]:
    """Takes down each step of a turn."""

    def step(own: Any, *args: Any, **kwargs: Any) -> Any:
        (scheduler,) = own.args
        plain = {k: v for k, v in vars(scheduler).items() if isinstance(v, int | float)}
        arguments = bound(own, args, kwargs)
        call = StepCall(plain, arguments, [])
        turn.calls.append(call)
        generator = arguments.get("generator")

        def draw(shape: tuple[int, ...], keywords: dict[str, Any]) -> Tensor:
            device, dtype = keywords.get("device"), keywords.get("dtype")
            call.draws.append(Draw(shape, generator, device, dtype))
            return _zeros(shape, keywords)

        with session.glue.drawing(draw):
            result = own(**without_generator(arguments))
        call.returned = list(tensors(result))
        return result

    return step


def bound(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method by parameter, without self."""
    found = inspect.signature(own.func).bind(*own.args, *args, **kwargs).arguments
    return dict(list(found.items())[1:])


def without_generator(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step that draws each of its noises in one call."""
    return arguments | ({"generator": None} if "generator" in arguments else {})


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors that a step returned, in order."""
    values: Sequence[Any] = result if isinstance(result, tuple) else list(result.values())
    return (x for x in values if isinstance(x, Tensor))


def _zeros(shape: tuple[int, ...], kwargs: dict[str, Any]) -> Tensor:
    return torch.zeros(shape, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


def same(x: object, y: Tensor) -> bool:
    """Whether ``x`` is ``y``, or its values in another dtype."""
    if x is y:
        return True
    return (
        isinstance(x, Tensor)
        and x.shape == y.shape
        and x.device == y.device
        and x.dtype.is_floating_point
        and (torch.equal(x, y.to(x.dtype)) or torch.equal(x.to(y.dtype), y))
    )


def mocked() -> Any:
    """A call of models that returns random numbers of the shape of their output."""
    return _Mock(guess=True)


class _Mock:
    """Returns random numbers of the shape of a model's output.

    The shape of a denoiser's output follows from its configuration. What others return, such as a
    ControlNet, is what they return when they are called for the first time.
    """

    def __init__(self, guess: bool) -> None:
        self._guess = guess
        self._known: dict[int, Any] = {}
        self._generator = torch.Generator().manual_seed(0x5EED)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = unwrapped(module)
        config = getattr(module, "config", None)
        denoiser = hasattr(config, "in_channels") and "ControlNet" not in type(module).__name__
        x = _input(args, kwargs)
        if self._guess and denoiser and x is not None:
            ours, theirs = config.in_channels, getattr(config, "out_channels", None)  # type: ignore[union-attr]
            shape = list(x.shape)
            if theirs not in (None, ours) and x.ndim > 3 and shape[1] == ours:
                shape[1] = theirs
            noise = torch.randn(shape, generator=self._generator, dtype=torch.float32)
            return Outputs((noise.to(x.device, x.dtype),))
        if id(module) not in self._known:
            self._known[id(module)] = module(*args, **kwargs)
        return self._known[id(module)]


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    candidates = (kwargs.get("hidden_states"), kwargs.get("sample"), *args)
    return next((x for x in candidates if isinstance(x, Tensor) and x.ndim > 2), None)
