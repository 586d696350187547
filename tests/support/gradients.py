# SPDX-License-Identifier: Apache-2.0
"""Gradients, and what they are held against."""

import torch
from torch.autograd import gradcheck

# Central differences at 1e-5 err by about 1e-10, from the third derivative and from rounding.
TOLERANCE = {"eps": 1e-5, "atol": 1e-7, "rtol": 1e-6}


def check(run, *inputs, whole=False):
    """Every input's gradient against central differences: a projection or the whole Jacobian."""
    options = {"fast_mode": not whole, "check_undefined_grad": False}
    assert gradcheck(lambda *_: run(), inputs, **options, **TOLERANCE)


def gradients(output, inputs, **options):
    return torch.autograd.grad(output.sin().sum(), inputs, **options)


def assert_close(got, expected, tolerance=1e-12, what=""):
    error = (got.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), f"{what}: {error} of {expected.norm()}"
