# SPDX-License-Identifier: Apache-2.0
"""The noise sources by name, each with typical parameters."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gradsampler import _checks
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import (
    Given,
    Mixture,
    NoiseSource,
    Off,
    Philox,
    SignedRoll,
    SinCos,
)


class Family(NamedTuple):
    """A class of sources, and one of them for a run that starts at z0 and injects so often."""

    source: type[NoiseSource]
    typical: Callable[[Tensor, int], NoiseSource]


# Typical is what a test should meet: no parameter at its default, seeds of 64 bits.
_REGISTRY: dict[str, Family] = {
    "off": Family(Off, lambda z0, n: Off()),
    "sincos": Family(SinCos, lambda z0, n: SinCos(0.2, 0.3, 0.4, 0.15)),
    "signed_roll": Family(SignedRoll, lambda z0, n: SignedRoll(2**63 + 5)),
    "philox": Family(Philox, lambda z0, n: Philox(2**64 - 1)),
    "mixture": Family(Mixture, lambda z0, n: Mixture(SignedRoll(3), 0.7, 2**40 + 7)),
    "given": Family(Given, lambda z0, n: Given([Philox(11).at(z0, k, n) for k in range(n)])),
    "replayed": Family(
        Replayed, lambda z0, n: Replayed(lambda z0, i, draw: Philox(23).at(z0, i, n, draw))
    ),
}


def _default(source: type[NoiseSource]) -> bool:
    parameters = inspect.signature(source).parameters.values()
    return all(each.default is not each.empty for each in parameters)


def names() -> list[str]:
    """The names of the sources that need no arguments.

    Example:
        >>> names()
        ['off', 'philox', 'signed_roll', 'sincos']
    """
    return sorted(name for name, family in _REGISTRY.items() if _default(family.source))


def resolve(name: str) -> NoiseSource:
    """The source of a name of `names()`, with its default parameters."""
    return _REGISTRY[_checks.choice("noise", name, names())].source()


def typical(z0: Tensor, injections: int) -> dict[str, NoiseSource]:
    """One source of every registered class, with parameters that are not its defaults.

    Args:
        z0: [B, *state] initial noise of the run.
        injections: how often the run injects; `Given` has a tensor for each.
    """
    return {name: family.typical(z0, injections) for name, family in _REGISTRY.items()}


def register(
    name: str,
    source: type[NoiseSource],
    typical: Callable[[Tensor, int], NoiseSource] | None = None,
) -> None:
    """Adds a class of sources under a new name.

    Args:
        name: not yet taken.
        source: the class; where its parameters all have defaults, the name stands for these.
        typical: a source of the class from z0 and the number of injections; by default one with
            its default parameters.
    """
    if name in _REGISTRY:
        _checks.fail("name", "be new", repr(name))
    if typical is None and not _default(source):
        _checks.fail("typical", f"be given, as {source.__name__} needs arguments", None)
    _REGISTRY[name] = Family(source, typical or (lambda z0, n: source()))
