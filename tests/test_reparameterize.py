# SPDX-License-Identifier: Apache-2.0
"""`gs.ops.reparameterize` against its formula in float64."""

import math

import pytest
import torch

import gradsampler as gs

# One rounding of the result, plus float32 arithmetic of values of a few units.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(dtype, shape=(3, 5, 7)):
    """mean, log variance and noise, rounded to a dtype."""
    return (normal(*s, seed=k).to(dtype) for k, s in enumerate(((3, 5, 7), shape, (3, 5, 7))))


def near(got, expected, dtype):
    assert got.dtype == dtype
    error = (got.double() - expected).abs() / (1 + expected.abs())
    assert error.max().item() <= TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 1, 1), (7,), (1,)], ids=str)
def test_value_and_gradients(shape, dtype):
    mean, logs, noise = (x.requires_grad_() for x in case(dtype, shape))
    nonzero = torch.tensor([1.0, 0.0, 0.5], dtype=dtype).requires_grad_()
    g = normal(3, 5, 7, seed=9).to(dtype)
    got = gs.ops.reparameterize(mean, logs, noise, nonzero=nonzero)
    found = torch.autograd.grad(got, (mean, logs, noise, nonzero), g)

    m, v, e, k, wide = (x.detach().double() for x in (mean, logs, noise, nonzero, g))
    amount = k.view(3, 1, 1) * torch.exp(v / 2)
    near(got, m + amount * e, dtype)
    near(found[0], wide, dtype)
    size = math.sqrt(105)  # the sums below are of so many elements at most
    near(found[1] / size, (wide * amount * e / 2).sum_to_size(v.shape) / size, dtype)
    near(found[2], amount * wide, dtype)
    each = (wide * torch.exp(v / 2) * e).sum((1, 2))
    near(found[3] / size, each / size, dtype)


def test_a_worked_example():
    # exp(2 ln 3 / 2) = 3, halved at the second sample.
    mean, noise = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [-4.0]])
    logs = torch.tensor([2 * math.log(3.0)])
    got = gs.ops.reparameterize(mean, logs, noise, nonzero=torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(got, torch.tensor([[7.0], [-5.0]]))


def test_mixed_dtypes_and_only_what_is_needed():
    mean, logs, noise = case(torch.float32)
    logs, noise = logs.to(torch.bfloat16).requires_grad_(), noise.double()
    got = gs.ops.reparameterize(mean, logs, noise)
    near(got, mean.double() + torch.exp(logs.detach().double() / 2) * noise, torch.float32)
    (found,) = torch.autograd.grad(got.sum(), logs)
    exact = torch.exp(logs.detach().double() / 2) * noise / 2
    near(found, exact, torch.bfloat16)


def test_the_gradient_of_the_mean_is_a_tensor_of_its_own():
    mean, logs, noise = case(torch.float64)
    mean.requires_grad_()
    g = normal(3, 5, 7, seed=9)
    (found,) = torch.autograd.grad(gs.ops.reparameterize(mean, logs, noise), mean, g)
    found.zero_()
    assert g.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_variance": torch.ones(2, 3)},
         r"log_variance must be broadcastable to shape \[2, 4\], got \[2, 3\]"),
        ({"log_variance": torch.ones(1, 2, 4)}, r"to shape \[2, 4\], got \[1, 2, 4\]"),
        ({"noise": torch.ones(2, 3)}, r"reparameterize: noise must have shape \[2, 4\], got"),
        ({"nonzero": torch.ones(3)}, r"reparameterize: nonzero must have shape \[2\], got"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_got(change, message):
    call = {"log_variance": torch.zeros(2, 4), "noise": torch.ones(2, 4)} | change
    with pytest.raises(ValueError, match=message):
        gs.ops.reparameterize(
            torch.zeros(2, 4), call.pop("log_variance"), call.pop("noise"), **call
        )
