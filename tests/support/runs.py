# SPDX-License-Identifier: Apache-2.0
"""Small runs: their levels, their solvers, and the tensors that gradients are asked for."""

import pytest
import torch

import gradsampler as gs

SOLVERS = gs.solvers.names()
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
