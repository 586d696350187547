# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the ancestral step, against the formula in float64 and its autograd."""

import importlib.util
import os
from itertools import product

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels need triton", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton decides when it is imported
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

from gradsampler.kernels import ancestral  # noqa: E402
from support.tiers import few  # noqa: E402

# As in test_kernel_step.py; exp adds its own rounding.
TOLERANCE = {
    torch.float64: 2e-14,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
COEFS = [1.3, 0.8, 0.6, 0.5, -0.4, -2.0]  # r1, r2, c1, c2, log_max, log_min
CLAMP = (-1.0, 1.0)


@pytest.fixture(autouse=True)
def poisoned():
    # This mode fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def oracle(x, output, noise, coefs, nonzero=1.0, clamp=None) -> Tensor:
    def column(c):
        c = torch.as_tensor(c, dtype=torch.float64, device=DEVICE)
        return c.view(-1, *[1] * (x.ndim - 1)) if c.ndim else c

    coefs = coefs.unbind(-1) if isinstance(coefs, Tensor) else coefs
    r1, r2, c1, c2, log_max, log_min = map(column, coefs)
    x, output = x.double(), output.double()
    eps, v = output, torch.ones((), dtype=torch.float64, device=DEVICE)
    if output.shape[1] == 2 * x.shape[1]:
        eps, v = output.chunk(2, dim=1)
    x0 = r1 * x - r2 * eps
    if clamp is not None:
        x0 = x0.clamp(*clamp)
    f = (v + 1) / 2
    out = c1 * x0 + c2 * x
    if noise is not None:
        log_var = f * log_max + (1 - f) * log_min
        out = out + column(nonzero) * torch.exp(log_var / 2) * noise.double()
    return out


def gradients(g, x, output, noise, *args):
    leaves = [t.detach().double().requires_grad_() for t in (x, output, noise)]
    return torch.autograd.grad(oracle(*leaves, *args), leaves, g.double(), allow_unused=True)


def close(got: Tensor, want: Tensor):
    scale = max(want.abs().max().item(), 1.0)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max().item() <= TOLERANCE[got.dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("clamp", [None, CLAMP])
def test_values_and_gradients(dtype, learned, clamp):
    x, n, g = (randn(2, 3, 5, 7, dtype=dtype) for _ in range(3))
    output = randn(2, 6 if learned else 3, 5, 7, dtype=dtype)
    got = ancestral.ancestral_step_fwd(x, output, n, COEFS, clamp=clamp)
    assert got.dtype == dtype
    close(got, oracle(x, output, n, COEFS, 1.0, clamp))
    found = ancestral.ancestral_step_bwd(g, x, output, n, COEFS, clamp=clamp)
    for mine, want in zip(found, gradients(g, x, output, n, COEFS, 1.0, clamp), strict=True):
        assert mine.dtype == dtype
        close(mine, want)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 255), (2, 1, 257), (2, 4, 16, 16)])
@pytest.mark.parametrize("block", [64, 1024])
def test_ragged_shapes_and_block_sizes(shape, block):
    x, n, g = randn(*shape), randn(*shape), randn(*shape)
    output = randn(shape[0], 2 * shape[1], *shape[2:])
    got = ancestral.ancestral_step_fwd(x, output, n, COEFS, clamp=CLAMP, block=block)
    close(got, oracle(x, output, n, COEFS, 1.0, CLAMP))
    found = ancestral.ancestral_step_bwd(g, x, output, n, COEFS, clamp=CLAMP, block=block)
    for mine, want in zip(found, gradients(g, x, output, n, COEFS, 1.0, CLAMP), strict=True):
        close(mine, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_of_each_sample(dtype):
    x, n, g = randn(3, 2, 9), randn(3, 2, 9), randn(3, 2, 9)
    output, coefs = randn(3, 4, 9), 0.5 * randn(3, 6, dtype=dtype)
    nonzero = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    got = ancestral.ancestral_step_fwd(x, output, n, coefs, nonzero=nonzero)
    close(got, oracle(x, output, n, coefs, nonzero))
    found = ancestral.ancestral_step_bwd(g, x, output, n, coefs, nonzero=nonzero)
    for mine, want in zip(found, gradients(g, x, output, n, coefs, nonzero), strict=True):
        close(mine, want)
    assert (found.noise[1] == 0).all()
    shared = ancestral.ancestral_step_fwd(x, output, n, coefs[0])
    close(shared, oracle(x, output, n, coefs[0].tolist()))


def test_mixed_dtypes_strides_and_out():
    x = randn(2, 4, 6, 5).transpose(2, 3)
    output = randn(2, 12, 5, 6, dtype=torch.bfloat16)[:, 2:10]
    n = randn(2, 4, 1, 6, dtype=torch.float16).expand(2, 4, 5, 6)
    out = torch.full((2, 4, 6, 5), torch.nan, device=DEVICE).transpose(2, 3)
    got = ancestral.ancestral_step_fwd(x, output, n, COEFS, clamp=CLAMP, out=out)
    assert got is out
    close(out, oracle(x, output, n, COEFS, 1.0, CLAMP))
    g = randn().expand(2, 4, 5, 6)
    found = ancestral.ancestral_step_bwd(g, x, output, n, COEFS, clamp=CLAMP)
    wants = gradients(g, x, output, n, COEFS, 1.0, CLAMP)
    for mine, source, want in zip(found, (x, output, n), wants, strict=True):
        assert mine.dtype == source.dtype
        close(mine, want)
    half = ancestral.ancestral_step_fwd(x, output, n, COEFS, out_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_no_noise():
    x, output, g = randn(2, 3, 5), randn(2, 6, 5), randn(2, 3, 5)
    close(ancestral.ancestral_step_fwd(x, output, None, COEFS), oracle(x, output, None, COEFS))
    found = ancestral.ancestral_step_bwd(g, x, output, None, COEFS)
    assert found.noise is None
    assert (found.model_output[:, 3:] == 0).all()
    close(found.model_output[:, :3].contiguous(), -0.6 * 0.8 * g.double())


def test_other_mean_and_variance_types_are_other_numbers():
    x, output, n = randn(2, 3, 5), randn(2, 6, 5), randn(2, 3, 5)
    got = ancestral.ancestral_step_fwd(x, output, n, [0.0, -1.0, 0.6, 0.5, 1.0, -1.0])
    x0, log_var = output.double().chunk(2, dim=1)
    close(got, 0.6 * x0 + 0.5 * x.double() + torch.exp(log_var / 2) * n.double())


@pytest.mark.parametrize("needs", range(8))
def test_only_what_is_needed(needs):
    x, output, n, g = randn(2, 3, 5), randn(2, 6, 5), randn(2, 3, 5), randn(2, 3, 5)
    asked = [bool(needs >> k & 1) for k in range(3)]
    found = ancestral.ancestral_step_bwd(
        g, x, output, n, COEFS, clamp=CLAMP,
        needs_x=asked[0], needs_model_output=asked[1], needs_noise=asked[2],
    )  # fmt: skip
    wants = gradients(g, x, output, n, COEFS, 1.0, CLAMP)
    for need, mine, want in zip(asked, found, wants, strict=True):
        assert (mine is not None) == need
        if need:
            close(mine, want)


class Ancestral(torch.autograd.Function):
    """The two kernels under autograd."""

    @staticmethod
    def forward(ctx, x, output, noise, clamp):
        ctx.save_for_backward(x, output, noise)
        ctx.clamp = clamp
        return ancestral.ancestral_step_fwd(x, output, noise, COEFS, clamp=clamp)

    @staticmethod
    def backward(ctx, g):
        return *ancestral.ancestral_step_bwd(g, *ctx.saved_tensors, COEFS, clamp=ctx.clamp), None


@pytest.mark.parametrize(
    ("channels", "clamp"), few(list(product([2, 4], [None, CLAMP])), (2, CLAMP))
)
def test_gradcheck_in_float64(channels, clamp):
    x, n = (randn(2, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    output = randn(2, channels, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: Ancestral.apply(*a, clamp), (x, output, n))
