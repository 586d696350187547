# SPDX-License-Identifier: Apache-2.0
"""Pipelines by each way beside plain autograd through their own code: what the tables show."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradsampler.integrations.diffusers as gsd
from support import pipelines, schedulers
from support.pipelines import apart, leaves

WAYS = ("program", "steps", "calls")
EMBEDDED = ("flux", "lcm")  # upstream turns their guidance scale into a tensor without gradient

Gradients = Mapping[str, Tensor | None]


class Error(NamedTuple):
    """How far a way is from the pipeline's own code, relative."""

    sample: float
    gradient: float  # the worst of the arguments, and of all parameters together


@dataclass(frozen=True)
class Compared:
    """One call of a pipeline by each way that it can go."""

    kind: str  # the pipeline's class
    scheduler: str
    method: str  # that "auto" takes
    errors: dict[str, Error] = field(default_factory=dict)  # by way
    against: Mapping[str, str] = field(default_factory=dict)  # by way, why it cannot go it

    def cells(self, *first: str) -> tuple[str, ...]:
        """A row of a table."""
        errors = (self.errors.get(way) for way in WAYS)
        shown = [(bound(e.sample), bound(e.gradient)) if e else ("", "") for e in errors]
        return (*first, self.method, *(cell for pair in shown for cell in pair))


def bound(error: float) -> str:
    """The least power of ten that an error does not exceed."""
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error) - 1e-9)}"


def gradients(x: Tensor, named: Mapping[str, Tensor]) -> Gradients:
    """Of the mean square of ``x`` to each of the tensors."""
    found = torch.autograd.grad(x.square().mean(), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def farthest(ours: Gradients, theirs: Gradients) -> float:
    """The largest relative distance: each argument by itself, and the parameters together, since
    of some of them the gradient is rounding.
    """
    assert {k for k, g in ours.items() if g is None} == {k for k, g in theirs.items() if g is None}
    there = {k: g for k, g in theirs.items() if g is not None}
    parameters = [k for k in there if "." in k]
    found = [apart(ours[name], g) for name, g in there.items() if name not in parameters]
    if parameters:
        flat = [torch.cat([each[k].flatten() for k in parameters]) for each in (ours, there)]
        found.append(apart(*flat))
    return max(found)


def compared(
    pipe: Any,
    arguments: Callable[[], dict[str, Any]],
    named: Callable[[dict[str, Any]], dict[str, Tensor]],
    own: Callable[[], tuple[Tensor, Gradients]],
) -> Compared:
    """Goes each way.

    Args:
        pipe: the pipeline.
        arguments: of its call, with new generators of the same seed.
        named: what is differentiated by, of the arguments.
        own: sample and gradients of the pipeline's own code.
    """
    sample, wanted = own()
    explained = gsd.explain(pipe, **arguments())
    errors = {}
    for way in WAYS:
        if way in explained.against:
            continue
        given = arguments()
        x = gsd.pipeline(pipe, "checkpoint", way)(**given)
        assert (x.shape, x.dtype) == (sample.shape, sample.dtype)
        distance = 0.0 if torch.equal(x, sample) else apart(x, sample)
        errors[way] = Error(distance, farthest(gradients(x, named(given)), wanted))
    kind, scheduler = type(pipe).__name__, type(pipe.scheduler).__name__
    return Compared(kind, scheduler, explained.method, errors, explained.against)


def pipeline(name: str) -> Compared:
    """A case of `pipelines.CASES`."""
    case = pipelines.CASES[name]
    pipe = case.build()

    def named(arguments: dict[str, Any]) -> dict[str, Tensor]:
        found = leaves(pipe, arguments)
        if name in EMBEDDED:
            del found["guidance_scale"]
        return found

    def own() -> tuple[Tensor, Gradients]:
        arguments = case.arguments()
        plain = dict(arguments)
        if name in EMBEDDED:
            plain["guidance_scale"] = plain["guidance_scale"].item()
        sample = pipelines.own(pipe, plain)
        return sample, gradients(sample, named(arguments))

    return compared(pipe, case.arguments, named, own)


def scheduler(name: str, setup: schedulers.Setup) -> Compared:
    """A scheduler in a bare loop, differentiated by the state that it begins with."""
    pipe = schedulers.pipeline(schedulers.classes()[name], setup)
    # In float32 the gradient through IPNDM's first step is a difference of numbers near 1e8.
    dtype = torch.float64 if name == "IPNDMScheduler" else torch.float32
    pipe.unet.to(dtype).requires_grad_(False)

    def arguments() -> dict[str, Any]:
        torch.manual_seed(5)
        given = schedulers.arguments(setup)
        given["latents"] = given["latents"].detach().to(dtype).requires_grad_()
        return given

    def named(arguments: dict[str, Any]) -> dict[str, Tensor]:
        return {"latents": arguments["latents"]}

    def own() -> tuple[Tensor, Gradients]:
        given, call = arguments(), inspect.unwrap(type(pipe).__call__)
        sample = call(pipe, **given, return_dict=False)[0]
        return sample, gradients(sample, named(given))

    return compared(pipe, arguments, named, own)
