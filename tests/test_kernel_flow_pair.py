# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the flow-matching pair, against the formula in float64."""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels need triton", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton decides when it is imported
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

from gradsampler.kernels import flow_pair  # noqa: E402
from gradsampler.noise import philox  # noqa: E402
from support.tiers import few  # noqa: E402

# As in test_kernel_step.py.
TOLERANCE = {
    torch.float64: 2e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def poisoned():
    # This mode fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def times(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0, 1, batch, dtype=dtype, device=DEVICE)


def oracle(x0, x1, t, sigma_min=1e-5) -> tuple[Tensor, Tensor]:
    x0, x1 = x0.double(), x1.double()
    r = 1 - t.double().view(-1, *[1] * (x0.ndim - 1))
    return r * x0 + (1 - (1 - sigma_min) * r) * x1, (1 - sigma_min) * x1 - x0


def gradients(gx, gv, x0, x1, t):
    leaves = [x.detach().double().requires_grad_() for x in (x0, x1, t)]
    x_t, v = oracle(*leaves)
    total = 0.0
    if gx is not None:
        total = total + (gx.double() * x_t).sum()
    if gv is not None:
        total = total + (gv.double() * v).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True)


def close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None, factor: float = 1.0):
    scale = max(want.abs().max().item(), 1.0)
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= factor * TOLERANCE[dtype or got.dtype] * scale


@DTYPES
def test_values_and_gradients(dtype):
    x0, x1, gx, gv = (randn(3, 5, 7, dtype=dtype) for _ in range(4))
    t = times(3)
    pair = flow_pair.flow_pair_fwd(x0, t, x1)
    for got, want in zip(pair, oracle(x0, x1, t), strict=True):
        assert got.dtype == dtype
        close(got, want)
    found = flow_pair.flow_pair_bwd(gx, gv, x0, t, x1)
    dx0, dx1, dt = gradients(gx, gv, x0, x1, t)
    close(found.x0, dx0)
    close(found.x1, dx1)
    close(found.t, dt, torch.float64 if dtype == torch.float64 else torch.float32, 5)


@DTYPES
@pytest.mark.parametrize("shape", few([((3, 333),), ((2, 64),), ((4, 1),)], ((3, 333),)))
def test_drawn_noise_is_that_of_the_definition(dtype, shape):
    x0, gx, gv = (randn(*shape, dtype=dtype) for _ in range(3))
    t, seed = times(shape[0]), 2**40 + 3
    x1 = philox.normals(x0.numel(), 0, seed, dtype, torch.device(DEVICE)).view(shape)
    # A draw near the middle of two 16-bit numbers may round either way: allow its ulp.
    factor = 4 if dtype in (torch.float16, torch.bfloat16) else 3
    for block in (64, 2048):
        pair = flow_pair.flow_pair_fwd(x0, t, seed=seed, block=block)
        for got, want in zip(pair, oracle(x0, x1, t), strict=True):
            close(got, want, factor=factor)
    found = flow_pair.flow_pair_bwd(gx, gv, x0, t, seed=seed)
    dx0, _, dt = gradients(gx, gv, x0, x1, t)
    close(found.x0, dx0)
    assert found.x1 is None
    # The interpreter's 16-bit draws are cut off, not rounded, which shifts the sum.
    bound = 5 * TOLERANCE[dtype] * gx.double().norm().item() * max(1.0, dt.abs().max().item())
    assert (found.t - dt).abs().max().item() <= bound


@pytest.mark.parametrize("shape", [(1, 1), (2, 255), (2, 257), (3, 3, 16, 16), (0, 4)])
@pytest.mark.parametrize("block", [64, 1024])
def test_ragged_shapes_and_block_sizes(shape, block):
    x0, x1, gx, gv, t = randn(*shape), randn(*shape), randn(*shape), randn(*shape), times(shape[0])
    pair = flow_pair.flow_pair_fwd(x0, t, x1, block=block)
    found = flow_pair.flow_pair_bwd(gx, gv, x0, t, x1, block=block)
    if shape[0] == 0:
        assert (pair[0].shape, found.x0.shape, found.t.shape) == (shape, shape, (0,))
        return
    for got, want in zip(pair, oracle(x0, x1, t), strict=True):
        close(got, want)
    dx0, dx1, dt = gradients(gx, gv, x0, x1, t)
    close(found.x0, dx0)
    close(found.x1, dx1)
    close(found.t, dt, torch.float32, 10)


def test_strides_dtypes_and_sigma_min():
    x0 = randn(2, 6, 5).transpose(1, 2)
    x1 = randn(2, 5, 1, dtype=torch.bfloat16).expand(2, 5, 6)
    t = times(4, torch.float64)[::2]
    pair = flow_pair.flow_pair_fwd(x0, t, x1, sigma_min=0.25, out_dtype=torch.float64)
    for got, want in zip(pair, oracle(x0, x1, t, 0.25), strict=True):
        close(got, want)
    found = flow_pair.flow_pair_bwd(randn().expand(2, 5, 6), None, x0, t, x1)
    assert found.x1.dtype == torch.bfloat16


@pytest.mark.parametrize("needs", range(8))
@pytest.mark.parametrize("cotangents", ["both", "x_t", "v"])
def test_only_what_is_needed(needs, cotangents):
    x0, x1, t = randn(2, 30), randn(2, 30), times(2)
    gx = None if cotangents == "v" else randn(2, 30)
    gv = None if cotangents == "x_t" else randn(2, 30)
    asked = [bool(needs >> k & 1) for k in range(3)]
    found = flow_pair.flow_pair_bwd(
        gx, gv, x0, t, x1, needs_x0=asked[0], needs_x1=asked[1], needs_t=asked[2]
    )
    wants = gradients(gx, gv, x0, x1, t)
    for need, mine, want in zip(asked, found, wants, strict=True):
        if not need or want is None:  # v does not depend on t
            assert mine is None
        else:
            close(mine, want, torch.float32, 5)


class Pair(torch.autograd.Function):
    """The two kernels under autograd."""

    @staticmethod
    def forward(ctx, x0, t, x1):
        ctx.save_for_backward(x0, t, x1)
        return flow_pair.flow_pair_fwd(x0, t, x1)

    @staticmethod
    def backward(ctx, gx, gv):
        found = flow_pair.flow_pair_bwd(gx, gv, *ctx.saved_tensors)
        return found.x0, found.t, found.x1


def test_gradcheck_in_float64():
    x0, x1 = (randn(2, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    t = torch.tensor([0.25, 0.75], dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(Pair.apply, (x0, t, x1))
