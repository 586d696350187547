# SPDX-License-Identifier: Apache-2.0
"""A pipeline as a differentiable function of all that it takes, by the best way that it can go."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.engine import parts
from gradsampler.integrations.diffusers import calls, decoding, program, steps
from gradsampler.integrations.diffusers.loop import Loop, NoLoop, own_call
from gradsampler.integrations.diffusers.rehearsal import Refused, Rehearsal, rehearse
from gradsampler.integrations.diffusers.session import Session
from gradsampler.integrations.diffusers.table import Table, read
from gradsampler.memory import Auto, Checkpoint, Memory, Offload, resolve
from gradsampler.memory.planning import following
from gradsampler.noise.sources import NoiseSource
from gradsampler.repetition import RandomState

__all__ = ["Explanation", "Pipeline", "explain", "pipeline"]

METHODS = ("auto", "program", "steps", "calls")
_CALLBACKS = ("callback_on_step_end", "callback")


@dataclass(frozen=True)
class Explanation:
    """Which method a call uses, and why a better one is not possible."""

    method: str  # "program" | "steps" | "calls"
    against: Mapping[str, str] = field(default_factory=dict)  # by way, the reason

    def __str__(self) -> str:
        lines = [f"method: {self.method}"]
        lines += [f"not {way}: {reason}" for way, reason in self.against.items()]
        return "\n".join(lines)


def pipeline(pipe: Any, memory: str | Memory = "auto", method: str = "auto") -> "Pipeline":
    """Makes a diffusers pipeline differentiable.

    Args:
        pipe: a `diffusers.DiffusionPipeline`; it is not changed.
        memory: what is kept for backward: a name of `gradsampler.memory.names()` or an object. With
            "calls" it is "auto", "checkpoint" or "store". "auto" leaves room for the decoder if
            images are asked for, and `memory.Auto(after=loss)` for a loss on the latents.
        method: "program" runs the scheduler's coefficients around the models, with every memory
            strategy, any `noise` and gradients to ``levels``; its sample is the pipeline's up to
            rounding. "steps" runs the iterations of the pipeline's loop one by one, with every
            strategy for step maps, and "calls" runs the pipeline's own code; their samples are the
            pipeline's bit for bit. "auto" is the first of them that works for a call.

    Returns:
        A `Pipeline`: a callable with the pipeline's own arguments, which gives its latents.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    if not hasattr(pipe, "scheduler") or not callable(pipe):
        _checks.fail_type("pipe", "be a diffusers pipeline with a scheduler", pipe)
    resolve(memory)
    return Pipeline(pipe, memory, _checks.choice("method", method, METHODS))


def explain(pipe: Any, **arguments: Any) -> Explanation:
    """Says which method a call of a pipeline uses, and why a better one is not possible.

    Nothing is drawn from your generators, and no denoiser is called.

    Args:
        pipe: a `diffusers.DiffusionPipeline`.
        **arguments: of the call.
    """
    pipeline(pipe)
    before = _random(pipe, arguments)
    try:
        return _prepared(Session(pipe, arguments)).explanation
    finally:
        before.restore()


@dataclass
class _Prepared:
    """A call whose loop was taken apart and run dry, as far as that goes."""

    explanation: Explanation
    loop: Loop | None = None
    rehearsal: Rehearsal | None = None
    table: Table | None = None
    carried: steps.Carried | None = None


class Pipeline:
    """A differentiable pipeline, called as the pipeline is; `pipeline` makes one."""

    def __init__(self, pipe: Any, memory: str | Memory, method: str) -> None:
        self._pipe, self._memory, self._method = pipe, memory, method
        self.explanation: Explanation | None = None  # of the latest call
        self._following: dict[object, int] = {}  # bytes of what follows the run, by its state

    def __call__(
        self,
        *args: Any,
        noise: NoiseSource | None = None,
        levels: Tensor | None = None,
        decode: str = "auto",
        **kwargs: Any,
    ) -> Any:
        """Runs the pipeline.

        Args:
            *args, **kwargs: the pipeline's own. ``output_type`` is "latent" unless it is "pt".
                ``latents`` can be given to pipelines that have no such argument too, in the place
                of the noise that they begin with.
            noise: a `gradsampler.noise` object in the place of what the scheduler draws.
            levels: [N+1] in the place of ``scheduler.sigmas``; may require grad.
            decode: with ``output_type="pt"`` the `memory` of the decoder, as for `decode`.

        Returns:
            The pipeline's latents, or with ``output_type="pt"`` its images.
        """
        if noise is not None and not isinstance(noise, NoiseSource):
            _checks.fail_type("noise", "be a gradsampler.noise object or None", noise)
        arguments = _bound(self._pipe, args, kwargs)
        if torch.is_grad_enabled():
            _check_weights(self._pipe)
        session = Session(self._pipe, arguments, levels, decode)
        try:
            return self._run(session, arguments, noise)
        finally:
            session.close()

    def _run(self, session: Session, arguments: dict[str, Any], noise: NoiseSource | None) -> Any:
        if self._method != "calls":
            before = _random(self._pipe, arguments)
            prepared = _prepared(session)
            self.explanation = prepared.explanation
            found = prepared.explanation.method
            way = found if self._method == "auto" else self._method
            reason = prepared.explanation.against.get(way)
            if reason is None and way != "calls":
                return self._turns(session, prepared, way, noise)
            before.restore()
            if reason is not None:
                _checks.fail("method", "be one that this call can go", repr(way), reason)
        else:
            self.explanation = Explanation("calls")
        again = session.anew()
        return again.result(calls.run(again, self._strategy(session), noise))

    def _strategy(self, session: Session, rehearsal: Rehearsal | None = None) -> str | Memory:
        """What is kept: no model call's graph where the weights will be elsewhere in backward, and
        with room for what follows the loop.
        """
        strategy = resolve(self._memory)
        if not torch.is_grad_enabled():
            return self._memory
        if session.offloaded:
            if isinstance(strategy, Auto):
                return Checkpoint()
            if not isinstance(strategy, Checkpoint | Offload):
                _checks.fail(
                    "memory",
                    'be "auto", "checkpoint" or "offload" under enable_model_cpu_offload',
                    repr(self._memory),
                    "a call that is not made again would find its weights on another device",
                )
        x = None if rehearsal is None else rehearsal.first
        if x is None or not isinstance(strategy, Auto):
            return self._memory
        if strategy.after is None and session.decodes is not None:
            return Auto(decoding.reserve(session.decodes, x.numel(), x))
        if callable(strategy.after):
            key = x.shape, x.dtype, x.device
            if key not in self._following:
                self._following[key] = following.measured(strategy.after, x).peak
            return Auto(self._following[key])
        return self._memory

    def _turns(
        self, session: Session, prepared: _Prepared, way: str, noise: NoiseSource | None
    ) -> Any:
        loop, rehearsal = prepared.loop, prepared.rehearsal
        assert loop is not None
        assert rehearsal is not None
        memory = self._strategy(session, rehearsal)
        names: dict[str, Any]
        x: Tensor | None
        if way == "program":
            assert prepared.table is not None
            names, x = program.run(
                session,
                loop,
                rehearsal,
                prepared.table,
                memory=memory,
                noise=noise,
            )
        else:
            assert prepared.carried is not None
            names, x = steps.run(
                session,
                loop,
                rehearsal,
                prepared.carried,
                memory=memory,
                noise=noise,
            )
        if x is not None and not session.wants_tail:
            return x
        with session.glue:
            return session.result(loop.tail(names))


def _prepared(session: Session) -> _Prepared:
    """Takes the loop apart and runs it dry."""
    given = [name for name in _CALLBACKS if session.arguments.get(name) is not None]
    if given:
        return _only_calls(f"{given[0]} may change anything between two steps")
    try:
        loop = Loop(session.call)
        with session.glue, session.glue.drawing(session.started):
            head = loop.head(session.pipe, **session.arguments)
        rehearsal = rehearse(session, loop, head)
    except NoLoop as reason:
        return _only_calls(f"{session.name}.__call__ cannot be taken apart: {reason}")
    except Refused as reason:
        return _only_calls(str(reason))
    against: dict[str, str] = {}
    table = carried = None
    results = loop.read_after if session.wants_tail else None
    try:
        table = read(rehearsal, session.scheduler, session.glue, results)
    except Refused as reason:
        against["program"] = str(reason)
    try:
        carried = steps.Carried(head, rehearsal, results)
    except Refused as reason:
        against["steps"] = str(reason)
    method = next(way for way in METHODS[1:] if way not in against)
    return _Prepared(Explanation(method, against), loop, rehearsal, table, carried)


def _only_calls(reason: str) -> _Prepared:
    return _Prepared(Explanation("calls", {"program": reason, "steps": reason}))


def _bound(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    call = own_call(pipe)
    names = [name for name in inspect.signature(call).parameters if name != "self"]
    if len(args) > len(names):
        raise TypeError(f"{type(pipe).__name__} takes {len(names)} arguments, got {len(args)}")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_weights(pipe: Any) -> None:
    """Refuses weights that are cast only while forward runs: backward would read others."""
    for name, part in vars(pipe).items():
        for p in part.parameters() if isinstance(part, nn.Module) else ():
            if p.dtype.is_floating_point and p.dtype.itemsize == 1:
                _checks.fail(
                    f"pipe: the weights of its {name}",
                    "be there in the dtype of the computation when backward reads them",
                    f"some of {p.dtype}, as after enable_layerwise_casting",
                    "cast them, or quantise by torchao or bitsandbytes, whose layers differentiate",
                )


def _random(pipe: Any, arguments: Mapping[str, Any]) -> RandomState:
    """The random state that a call of the pipeline may change."""
    device = pipe._execution_device
    return RandomState(device, generators=parts.reachable(arguments).generators)
