# SPDX-License-Identifier: Apache-2.0
"""Differentiable samplers for diffusion and flow models."""

from gradsampler import distributed, memory, noise, ops, policies, rewards, schedules, solvers
from gradsampler._version import __version__
from gradsampler.decoding.decode import decode
from gradsampler.engine.monitor import Monitor, MonitoredCall
from gradsampler.engine.observer import NonFiniteError, StepInfo
from gradsampler.engine.trajectory import GradientWarning
from gradsampler.gradient_flow import check
from gradsampler.gradient_health import health
from gradsampler.guidance import Guided
from gradsampler.iteration import iterate
from gradsampler.noise.energy import NoiseWarning
from gradsampler.ops import backends
from gradsampler.optimization import regularizers
from gradsampler.optimization.optimize import OptimizeResult, OptimizeStep, optimize
from gradsampler.parameterization import EDM, VP, Flow
from gradsampler.repetition import ReplayError
from gradsampler.sampling import integrate, sample
from gradsampler.solvers import Churn

__all__ = [
    "EDM",
    "VP",
    "Churn",
    "Flow",
    "GradientWarning",
    "Guided",
    "Monitor",
    "MonitoredCall",
    "NoiseWarning",
    "NonFiniteError",
    "OptimizeResult",
    "OptimizeStep",
    "ReplayError",
    "StepInfo",
    "__version__",
    "backends",
    "check",
    "decode",
    "distributed",
    "health",
    "integrate",
    "iterate",
    "memory",
    "noise",
    "ops",
    "optimize",
    "policies",
    "regularizers",
    "rewards",
    "sample",
    "schedules",
    "solvers",
]
