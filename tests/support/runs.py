# SPDX-License-Identifier: Apache-2.0
"""Small runs: their levels, their solvers, and the tensors that gradients are asked for."""

import pytest
import torch

import gradsampler as gs


def taking_levels(names):
    """Those of the solvers that step over the levels which they are given."""
    return [n for n in names if not isinstance(gs.solvers.resolve(n), gs.solvers.Adaptive)]


SOLVERS = taking_levels(gs.solvers.names())
# One of each structure, which stands for the others where what is tested is not the solver.
TYPICAL = [
    "euler",  # one evaluation a step
    "heun",  # two of them, and churn
    "dpmpp_2m",  # outputs of steps before
    "dpmpp_2m_sde",  # and a noise
    "dpmpp_sde",  # two noises a step
    "uni_pc",  # a corrector
    "midpoint_reversible",  # a state of two steps before
    "euler_ancestral_cfg_pp",  # branches of a guided prediction
    "restart",  # levels that rise again
]
LEVELS = (3.0, 1.3, 0.7, 0.3)  # N = 3
ABAR = torch.tensor([0.98, 0.8, 0.5, 0.2, 0.03], dtype=torch.float64)

solvers = pytest.mark.parametrize("solver", SOLVERS)


def levels(values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(x):
    return x.detach().clone().requires_grad_()


def injecting(name):
    """Options with which the solver of that name really injects noise."""
    solver = gs.solvers.resolve(name)
    if not solver.stochastic:
        return {"churn": gs.Churn(0.9, s_noise=1.1)}
    return {"eta": 0.7} if hasattr(solver, "eta") else {}
