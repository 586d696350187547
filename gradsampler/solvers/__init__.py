# SPDX-License-Identifier: Apache-2.0
"""Solvers by name. Each is a short file of coefficients; `register` adds one of your own."""

import dataclasses

from gradsampler import _checks
from gradsampler.solvers.ancestral import EulerAncestral
from gradsampler.solvers.base import Churn, Solver
from gradsampler.solvers.ddim import DDIM, DDPM
from gradsampler.solvers.dpmpp import DPMpp2M, DPMpp2MSDE
from gradsampler.solvers.euler import Euler
from gradsampler.solvers.heun import Heun, Midpoint
from gradsampler.solvers.res import Res2AB, Res2Mid, Res2MidStable
from gradsampler.solvers.reversible import MidpointReversible

__all__ = [
    "DDIM",
    "DDPM",
    "Churn",
    "DPMpp2M",
    "DPMpp2MSDE",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Midpoint",
    "MidpointReversible",
    "Res2AB",
    "Res2Mid",
    "Res2MidStable",
    "Solver",
    "names",
    "register",
    "resolve",
]

_REGISTRY: dict[str, type[Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "midpoint": Midpoint,
    "midpoint_reversible": MidpointReversible,
    "res_2ab": Res2AB,
    "res_2mid": Res2Mid,
    "res_2mid_stable": Res2MidStable,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "euler_ancestral": EulerAncestral,
    "ddim": DDIM,
    "ddpm": DDPM,
}


def names(*, flow: bool = False) -> list[str]:
    """The names of all solvers, or of those that are also defined in flow time."""
    return sorted(name for name, solver in _REGISTRY.items() if solver.flow or not flow)


def register(name: str, solver: type[Solver]) -> None:
    """Adds a solver class under a new name; its fields need defaults."""
    if name in _REGISTRY:
        _checks.fail("name", "be new", repr(name))
    _REGISTRY[name] = solver


def resolve(solver: str | Solver, eta: float | None = None, s_noise: float = 1.0) -> Solver:
    """The solver object for a name or an object, with ``eta`` and ``s_noise`` set where given."""
    if not isinstance(solver, Solver):
        solver = _REGISTRY[_checks.choice("solver", solver, _REGISTRY)]()
    given = {} if eta is None else {"eta": eta}
    if s_noise != 1.0:
        given["s_noise"] = s_noise
    for name, value in given.items():
        if name not in getattr(solver, "__dataclass_fields__", {}):
            kind = type(solver).__name__
            _checks.fail(name, f"be left at its default, as {kind} has no {name}", value)
    return dataclasses.replace(solver, **given) if given else solver  # type: ignore[type-var]
