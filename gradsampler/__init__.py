# SPDX-License-Identifier: Apache-2.0
"""Differentiable samplers for diffusion and flow models."""

from gradsampler import backends, memory, noise, ops, regularizers, schedules, solvers
from gradsampler._version import __version__
from gradsampler.observer import NonFiniteError, StepInfo
from gradsampler.optimize import OptimizeResult, OptimizeStep, optimize
from gradsampler.parameterization import EDM, VP, Flow, Guided
from gradsampler.replay import ReplayError
from gradsampler.sample import sample
from gradsampler.solvers import Churn
from gradsampler.trajectory import GradientWarning

__all__ = [
    "EDM",
    "VP",
    "Churn",
    "Flow",
    "GradientWarning",
    "Guided",
    "NonFiniteError",
    "OptimizeResult",
    "OptimizeStep",
    "ReplayError",
    "StepInfo",
    "__version__",
    "backends",
    "memory",
    "noise",
    "ops",
    "optimize",
    "regularizers",
    "sample",
    "schedules",
    "solvers",
]
