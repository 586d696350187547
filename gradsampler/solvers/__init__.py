# SPDX-License-Identifier: Apache-2.0
"""Solvers by name. Each is a short file of coefficients; `register` adds one of your own."""

import dataclasses
from collections.abc import Callable
from functools import partial

from gradsampler import _checks
from gradsampler.engine.program import Recorder
from gradsampler.solvers.adams import IPNDM, LMS, GradientEstimation, IPNDMv
from gradsampler.solvers.ancestral import DPM2Ancestral, DPMpp2SAncestral, EulerAncestral
from gradsampler.solvers.base import Churn, Solver
from gradsampler.solvers.cfg_pp import (
    DPMpp2MCFGpp,
    DPMpp2SAncestralCFGpp,
    EulerCFGpp,
    GradientEstimationCFGpp,
    ResMultistepCFGpp,
)
from gradsampler.solvers.consistency import Consistency
from gradsampler.solvers.correction import SASolver, UniPC
from gradsampler.solvers.ddim import DDIM, DDPM
from gradsampler.solvers.deis import DEIS
from gradsampler.solvers.dpm_solver import DPMFast
from gradsampler.solvers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp3MSDE, DPMppSDE
from gradsampler.solvers.er_sde import ERSDE
from gradsampler.solvers.euler import Euler
from gradsampler.solvers.heun import DPM2, Heun, HeunEDMx0, HeunPP2, Kutta3, Midpoint, Restart
from gradsampler.solvers.res import Res2AB, Res2Mid, Res2MidStable, ResMultistep
from gradsampler.solvers.reversible import MidpointReversible
from gradsampler.solvers.seeds import Seeds2, Seeds3
from gradsampler.solvers.spellings import SPELLINGS

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "ERSDE",
    "IPNDM",
    "LMS",
    "Churn",
    "Consistency",
    "DPM2Ancestral",
    "DPMFast",
    "DPMpp2M",
    "DPMpp2MCFGpp",
    "DPMpp2MSDE",
    "DPMpp2SAncestral",
    "DPMpp2SAncestralCFGpp",
    "DPMpp3MSDE",
    "DPMppSDE",
    "Euler",
    "EulerAncestral",
    "EulerCFGpp",
    "GradientEstimation",
    "GradientEstimationCFGpp",
    "Heun",
    "HeunEDMx0",
    "HeunPP2",
    "IPNDMv",
    "Kutta3",
    "Midpoint",
    "MidpointReversible",
    "Recorder",
    "Res2AB",
    "Res2Mid",
    "Res2MidStable",
    "ResMultistep",
    "ResMultistepCFGpp",
    "Restart",
    "SASolver",
    "Seeds2",
    "Seeds3",
    "Solver",
    "UniPC",
    "names",
    "register",
    "resolve",
]

_REGISTRY: dict[str, Callable[[], Solver]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "deis": DEIS,
    "dpm_2": DPM2,
    "dpm_2_ancestral": DPM2Ancestral,
    "dpm_fast": DPMFast,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_cfg_pp": DPMpp2MCFGpp,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "dpmpp_2m_sde_heun": partial(DPMpp2MSDE, variant="heun"),
    "dpmpp_2s_ancestral": DPMpp2SAncestral,
    "dpmpp_2s_ancestral_cfg_pp": DPMpp2SAncestralCFGpp,
    "dpmpp_3m_sde": DPMpp3MSDE,
    "dpmpp_sde": DPMppSDE,
    "er_sde": ERSDE,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "euler_ancestral_cfg_pp": partial(EulerCFGpp, eta=1.0),
    "euler_cfg_pp": EulerCFGpp,
    "gradient_estimation": GradientEstimation,
    "gradient_estimation_cfg_pp": GradientEstimationCFGpp,
    "heun": Heun,
    "heun_edm_x0": HeunEDMx0,
    "heunpp2": HeunPP2,
    "ipndm": IPNDM,
    "ipndm_v": IPNDMv,
    "kutta3": Kutta3,
    "lcm": Consistency,
    "lms": LMS,
    "midpoint": Midpoint,
    "midpoint_reversible": MidpointReversible,
    "res_2ab": Res2AB,
    "res_2mid": Res2Mid,
    "res_2mid_stable": Res2MidStable,
    "res_multistep": ResMultistep,
    "res_multistep_ancestral": partial(ResMultistep, eta=1.0),
    "res_multistep_ancestral_cfg_pp": partial(ResMultistepCFGpp, eta=1.0),
    "res_multistep_cfg_pp": ResMultistepCFGpp,
    "restart": Restart,
    "sa_solver": SASolver,
    "sa_solver_pece": partial(SASolver, pece=True),
    "seeds_2": Seeds2,
    "seeds_3": Seeds3,
    "uni_pc": UniPC,
    "uni_pc_bh2": partial(UniPC, variant="bh2"),
}


def names(*, flow: bool = False) -> list[str]:
    """The names of all solvers, or of those that are also defined in flow time."""
    return sorted(name for name, solver in _REGISTRY.items() if not flow or solver().flow)


def register(name: str, solver: Callable[[], Solver]) -> None:
    """Adds a solver class under a new name; its fields need defaults."""
    if name in _REGISTRY:
        _checks.fail("name", "be new", repr(name))
    _REGISTRY[name] = solver


def resolve(solver: str | Solver, eta: float | None = None, s_noise: float = 1.0) -> Solver:
    """The solver object for a name or an object, with ``eta`` and ``s_noise`` set where given."""
    if not isinstance(solver, Solver):
        solver = _REGISTRY[_checks.choice("solver", solver, _REGISTRY, SPELLINGS)]()
    given = {} if eta is None else {"eta": eta}
    if s_noise != 1.0:
        given["s_noise"] = s_noise
    for name, value in given.items():
        if name not in getattr(solver, "__dataclass_fields__", {}):
            kind = type(solver).__name__
            _checks.fail(name, f"be left at its default, as {kind} has no {name}", value)
    return dataclasses.replace(solver, **given) if given else solver  # type: ignore[type-var]
