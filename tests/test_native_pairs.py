# SPDX-License-Identifier: Apache-2.0
"""ancestral_step and flow_pair of the extension against float64 autograd."""

import pytest
import torch

from gradsampler.noise import philox
from gradsampler.ops import native, reference
from support.native_devices import DEVICES, default

pytestmark = pytest.mark.skipif(
    native.available() is not None, reason=f"extension: {native.available()}"
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-12, F32: 5e-6, BF16: 2**-7, F16: 2**-9}
ROW = [1.3, 0.9, 0.6, 0.35, -1.0, -3.5]


@pytest.fixture(params=DEVICES, autouse=True)
def _on_device(request):
    with default(request.param):
        yield


def near(got, expected, dtype):
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape
    error = (got - expected).abs() / (1 + expected.abs())
    assert error.numel() == 0 or error.max().item() <= TOLERANCE[dtype], error.max().item()


def ancestral64(x, model_output, table, noise, clamp, nonzero):
    """Nichol and Dhariwal 2021, equations 9 and 15, in float64; table [B, 6]."""
    shape = (len(x), *[1] * (x.ndim - 1))
    r1, r2, c1, c2, high, low = (table[:, k].reshape(shape) for k in range(6))
    eps, v = model_output, None
    if model_output.shape != x.shape:
        eps, v = model_output.chunk(2, dim=1)
    x0 = r1 * x - r2 * eps
    x0 = x0 if clamp is None else x0.clamp(*clamp)
    f = 1 if v is None else (v + 1) / 2
    log_var = f * high + (1 - f) * low
    keep = torch.as_tensor(nonzero, dtype=F64).expand(len(x)).reshape(shape)
    return c1 * x0 + c2 * x + keep * torch.exp(log_var / 2) * noise


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("rows", ["call", "sample"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 33, 31), (1, 1)])
def test_ancestral_step(dtype, learned, clamp, rows, shape):
    torch.manual_seed(1)
    batch, channels, *spatial = shape
    x, noise, g = (torch.randn(shape).to(dtype) for _ in range(3))
    model_output = torch.randn(batch, channels * (1 + learned), *spatial).to(dtype)
    table = torch.tensor(ROW, dtype=F64).expand(batch, 6)
    coefs, nonzero = ROW, 1.0
    if rows == "sample":
        table = table + 0.1 * torch.randn(batch, 6, dtype=F64)
        coefs, nonzero = table, torch.arange(batch).float() > 0
    leaves = [t.double().requires_grad_() for t in (x, model_output, noise)]
    expected = ancestral64(leaves[0], leaves[1], table, leaves[2], clamp, nonzero)
    options = {"clamp": clamp, "nonzero": nonzero}
    near(native.ancestral_step_fwd(x, model_output, noise, coefs, **options), expected, dtype)
    grads = torch.autograd.grad(expected, leaves, g.double())
    got = native.ancestral_step_bwd(g, x, model_output, noise, coefs, **options)
    for mine, exact in zip(got, grads, strict=True):
        near(mine, exact, dtype)


def test_last_step_ignores_an_infinite_log_variance():
    x = torch.randn(2, 3)
    row = [1.0, 0.0, 1.0, 0.0, -float("inf"), -float("inf")]
    assert torch.equal(native.ancestral_step_fwd(x, x, x, row), x)
    row[4] = float("inf")
    assert torch.equal(native.ancestral_step_fwd(x, x, x, row, nonzero=0.0), x)


def test_exponential_over_its_range():
    log_var = torch.linspace(-180, 170, 4001)
    coefs = torch.zeros(4001, 6)  # a sample for each log variance
    coefs[:, 4] = log_var
    one = torch.ones(4001, 17)  # vectors and their remainder
    exact = torch.exp(log_var.double() / 2)[:, None].expand(-1, 17)
    normal = exact > 2.0**-126
    for isa in native.isas():
        native.use_isa(isa)
        got = native.ancestral_step_fwd(one, one, one, coefs)
        assert (got / exact - 1).abs()[normal].max() < 3e-7
        assert got[~normal].max() <= 2.0**-125
    native.use_isa(native.isas()[0])


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 2049), (4, 1)])
def test_flow_pair(dtype, drawn, shape):
    torch.manual_seed(2)
    x0 = torch.randn(shape).to(dtype)
    t = torch.rand(shape[0], dtype=F64 if dtype == F64 else F32)
    seed = 2**63 + 9
    x1 = torch.randn(shape).to(dtype)
    if drawn:
        count = x0.numel()
        x1 = philox.normals(count, 0, seed, F32, x0.device).to(dtype).view(shape)
    x_t, v = native.flow_pair_fwd(x0, t, None if drawn else x1, seed=seed)
    leaves = [u.double().requires_grad_() for u in (x0, x1, t)]
    r = (1 - leaves[2]).view(-1, *[1] * (len(shape) - 1))
    exact_x = r * leaves[0] + (1 - (1 - 1e-5) * r) * leaves[1]
    exact_v = (1 - 1e-5) * leaves[1] - leaves[0]
    # Drawn normals are float32 whatever the dtype.
    precision = F32 if drawn and dtype == F64 else dtype
    near(x_t, exact_x, precision)
    near(v, exact_v, precision)

    gx, gv = (torch.randn(shape).to(dtype) for _ in range(2))
    for use_x, use_v in [(True, True), (True, False), (False, True)]:
        loss = use_x * (exact_x * gx).sum() + use_v * (exact_v * gv).sum()
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        got = native.flow_pair_bwd(
            gx if use_x else None, gv if use_v else None, x0, t, None if drawn else x1,
            seed=seed,
        )  # fmt: skip
        near(got.x0, grads[0], dtype)
        near(got.x1, grads[1], dtype)
        exact_t = torch.zeros_like(leaves[2]) if grads[2] is None else grads[2]
        size = max(1.0, x0[0].numel() ** 0.5)
        near(got.t.double() / size, exact_t / size, F64 if precision == F64 else F32)


@pytest.mark.parametrize("learned", [False, True])
def test_an_ancestral_step_without_noise(learned):
    x, g = torch.randn(2, 3, 5, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    output = torch.randn(2, 3 * (1 + learned), 5, dtype=F64)
    near(
        native.ancestral_step_fwd(x, output, None, ROW),
        reference.ancestral_step_fwd(x, output, None, ROW),
        F64,
    )
    mine = native.ancestral_step_bwd(g, x, output, None, ROW)
    exact = reference.ancestral_step_bwd(g, x, output, None, ROW)
    assert mine.noise is None
    near(mine.x, exact.x, F64)
    near(mine.model_output, exact.model_output, F64)


@pytest.mark.parametrize("nonzero", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.0])])
def test_a_factor_of_the_noise_that_is_not_one(nonzero):
    nonzero = nonzero if isinstance(nonzero, float) else nonzero.to(torch.get_default_device())
    x = torch.randn(2, 3, 5, dtype=F64)
    got = native.ancestral_step_fwd(x, x, x, ROW, nonzero=nonzero)
    near(got, reference.ancestral_step_fwd(x, x, x, ROW, nonzero=nonzero), F64)
