# SPDX-License-Identifier: Apache-2.0
"""step, its backward and the adjoint step of the extension against float64 formulas."""

import math

import pytest
import torch

from gradsampler import contract, noise
from gradsampler.contract import MAX_TERMS
from gradsampler.ops import native, reference
from support.native_devices import DEVICES, default
from support.noises import DRAWN

pytestmark = pytest.mark.skipif(
    native.available() is not None, reason=f"extension: {native.available()}"
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# One rounding of the stored result, plus float32 arithmetic of values of a few units.
TOLERANCE = {F64: 1e-12, F32: 3e-6, BF16: 2**-8, F16: 2**-10}
NOISES = DRAWN | {"given": None}
MIXTURES = {
    "f64": (F64, F64, F64, F64),
    "f32": (F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16),
    "f16": (F16, F16, F16, F16),
    "f32_bf16_to_f32": (F32, BF16, F32, F32),
    "f32_f16_to_bf16": (F32, F16, BF16, BF16),
    "f64_bf16_to_f16": (F64, BF16, F32, F16),
}
SHAPES = [(1, 2), (3, 5, 7), (2, 257), (1, 255), (2, 3, 1025), (5, 1024), (2, 2049)]
COEFS = [0.3, -1.2, 0.5, 0.25, -0.75, 1.5, 0.9, -0.4, 0.15, -1.1, 0.6, 0.35]


@pytest.fixture(params=DEVICES, autouse=True)
def _on_device(request):
    native.use_isa(native.isas()[0])
    with default(request.param):
        torch.manual_seed(0)
        yield
    native.use_isa(native.isas()[0])


def make(shape, dtype, layout="dense"):
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(shape[0], *[1] * (len(shape) - 1)).to(dtype).expand(shape)
    if layout == "rows":  # runs of a few elements, with gaps along every axis
        inner = torch.randn(*[2 * size for size in shape[:-1]], shape[-1] + 3).to(dtype)
        return inner[tuple([slice(None, None, 2)] * (len(shape) - 1) + [slice(shape[-1])])]
    return torch.randn(shape).to(dtype)


def draw_of(name, z0, step=17, num_steps=50):
    if name == "given":
        return noise.Given([z0.flip(0)] * (step + 1)).draw(z0, step, num_steps)
    return NOISES[name].draw(z0, step, num_steps)


def noise64(name, z0, step=17, num_steps=50):
    """The definition in float64; the normals as the kernels draw them."""
    if name == "given":
        return z0.flip(0).double()
    return NOISES[name].at(z0.double(), step, num_steps)


def near(got, expected, dtype=None, scale=1.0):
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape
    tolerance = scale * TOLERANCE[dtype or F32]
    error = (got - expected).abs() / (1 + expected.abs())
    assert error.numel() == 0 or error.max().item() <= tolerance, error.max().item()


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", NOISES)
def test_step_forward(name, mixture):
    a, b, z_dtype, out_dtype = MIXTURES[mixture]
    for shape in SHAPES:
        x, d, z0 = make(shape, a), make(shape, b), make(shape, z_dtype)
        out = native.step_fwd([x, d], COEFS[:2], z0, draw_of(name, z0), 0.7, out_dtype=out_dtype)
        assert out.dtype == out_dtype
        expected = 0.3 * x.double() - 1.2 * d.double() + 0.7 * noise64(name, z0)
        near(out, expected, out_dtype)


@pytest.mark.parametrize("count", range(1, MAX_TERMS + 1))
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_any_number_of_terms_coefficients_by_float_call_and_sample(count, dtype):
    shape = (3, 2, 701)
    terms = [make(shape, dtype) for _ in range(count)]
    z0 = make(shape, dtype)
    draw = draw_of("sincos", z0)
    rows = torch.randn(3, count, dtype=F64)
    for coefs in (COEFS[:count], torch.tensor(COEFS[:count]), rows, rows.float()):
        per = coefs if isinstance(coefs, torch.Tensor) else torch.tensor(coefs, dtype=F64)
        per = per.double().expand(3, count)
        expected = 0.1 * noise64("sincos", z0)
        for k, x in enumerate(terms):
            expected = expected + per[:, k].view(3, 1, 1) * x.double()
        near(
            native.step_fwd(terms, coefs, z0, draw, torch.tensor(0.1, dtype=F64)),
            expected,
            dtype,
            2,
        )


@pytest.mark.parametrize("shape", [(3, 37, 61), (2, 3, 2, 131, 5)], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "rows"])
@pytest.mark.parametrize("name", ["sincos", "signed_roll", "mixture", "given"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_step_strides(name, dtype, layout, shape):
    x, d, z0 = make(shape, dtype, layout), make(shape, F32), make(shape, dtype, layout)
    out = make(shape, F32, "transposed")
    got = native.step_fwd([x, d], COEFS[:2], z0, draw_of(name, z0), 0.7, out=out)
    assert got is out
    near(out, 0.3 * x.double() - 1.2 * d.double() + 0.7 * noise64(name, z0))


@pytest.mark.parametrize("name", ["off", "sincos", "philox"])
def test_clamp_acts_on_the_combination_before_the_noise(name):
    shape = (2, 1500)
    x, z0 = make(shape, F32), make(shape, F32)
    out, model = native.step_fwd(
        [x, x],
        [2.0, 1.0],
        z0,
        draw_of(name, z0),
        0.7,
        clamp=(-1.0, 1.0),
        model_scale=0.25,
        model_dtype=BF16,
    )
    expected = (3 * x.double()).clamp(-1, 1) + 0.7 * noise64(name, z0)
    near(out, expected)
    assert model.dtype == BF16
    near(model, 0.25 * expected, BF16)


def test_in_place_output_and_nan_through_clamp():
    x, d = make((2, 3001), F32), make((2, 3001), F32)
    x[0, 5] = math.nan
    expected = (0.5 * x + d).clamp(-1, 1)
    native.step_fwd([x, d], [0.5, 1.0], None, None, 0.0, clamp=(-1, 1), out=x)
    torch.testing.assert_close(x, expected, equal_nan=True)


@pytest.mark.parametrize("rate", [0.0, 0.3, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_sincos_over_the_whole_range(rate, dtype):
    z0 = torch.linspace(-6, 6, 20001, dtype=dtype)[None]
    for isa in native.isas():
        native.use_isa(isa)
        for phase in (0.0, 1.0, -3.0):
            draw = contract.Draw(contract.SINCOS, 3, rate=rate, amplitude=1.0, phase=phase)
            got = native.step_fwd([z0], [0.0], z0, draw, 1.0)
            exact = torch.sin(rate * z0.double() + phase)
            # The oracle's argument rounds in float64; without fused multiply-add the kernel's
            # rounds in its own type, as in any plain formula.
            rounds = torch.finfo(dtype if isa == "default" else F64).eps
            bound = 9 * rate * rounds + (4e-7 if dtype == F32 else 1e-15)
            assert (got.double() - exact).abs().max() < bound


@pytest.mark.parametrize("clamp", [None, (-0.8137, 0.9241)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("mixture", ["f64", "f32", "bf16", "f32_f16_to_bf16"])
def test_step_backward(mixture, name, per_sample, clamp):
    a, b, z_dtype, g_dtype = MIXTURES[mixture]
    for shape in [(3, 5, 7), (2, 1025), (2, 3000)]:
        x, d, z0, g = (make(shape, t) for t in (a, b, z_dtype, g_dtype))
        rows = torch.randn(shape[0], 2, dtype=F64)
        coefs = rows if per_sample else COEFS[:2]
        start = make(shape, F64 if mixture == "f64" else F32)
        dz0 = start.clone()
        noise_coef = torch.tensor(0.7, dtype=F64)
        draw = draw_of(name, z0)
        dterms, dcoefs, dnoise, dgiven = native.step_bwd(
            g, [x, d], coefs, z0, draw, noise_coef, dz0=dz0, clamp=clamp,
            needs_terms=[True, True], needs_coefs=True, needs_noise_coef=True, needs_given=True,
        )  # fmt: skip

        leaves = [t.double().requires_grad_() for t in (x, d, z0)]
        table = (rows if per_sample else torch.tensor(COEFS[:2], dtype=F64)).requires_grad_()
        scale = noise_coef.clone().requires_grad_()
        per = table.expand(shape[0], 2).reshape(shape[0], 2, *[1] * (len(shape) - 1))
        lin = per[:, 0] * leaves[0] + per[:, 1] * leaves[1]
        lin = lin if clamp is None else lin.clamp(*clamp)
        given = z0.flip(0).double().requires_grad_()
        injected = given if name == "given" else NOISES[name].at(leaves[2], 17, 50)
        out = lin + scale * injected
        target = given if name == "given" else leaves[2]
        grads = torch.autograd.grad(
            out, [*leaves[:2], target, table, scale], g.double(), allow_unused=True
        )
        near(dterms[0], grads[0], a, 2)
        near(dterms[1], grads[1], b, 2)
        pulled = torch.zeros_like(start, dtype=F64) if grads[2] is None else grads[2]
        if name == "given":
            assert dgiven.dtype == draw.given.dtype
            near(dgiven, pulled, dgiven.dtype, 2)
            pulled = 0.0
        else:
            assert dgiven is None
        near(dz0, start.double() + pulled, dz0.dtype, 2)
        assert dcoefs.dtype == dnoise.dtype == F64
        size = math.sqrt(start.numel())
        near(dcoefs / size, grads[3] / size, F64 if mixture == "f64" else F32, 2)
        near(dnoise / size, grads[4] / size, F64 if mixture == "f64" else F32, 2)


@pytest.mark.parametrize("clamp", [None, (-0.8, 0.9)])
@pytest.mark.parametrize("count", [3, MAX_TERMS])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_backward_of_any_number_of_terms(dtype, count, clamp, monkeypatch):
    for name in ("step_fwd", "step_bwd"):
        monkeypatch.delattr(reference, name)  # one launch, and no fall back
    terms = [make((2, 1025), dtype) for _ in range(count)]
    g, z0 = make((2, 1025), dtype), make((2, 1025), dtype)
    dz0 = torch.zeros_like(z0, dtype=F32)
    got = native.step_bwd(
        g, terms, COEFS[:count], z0, draw_of("sincos", z0), 0.7, dz0=dz0, clamp=clamp,
        needs_terms=[True] * count, needs_coefs=True, needs_noise_coef=True,
    )  # fmt: skip
    total = sum(c * x.double() for c, x in zip(COEFS, terms, strict=False))
    through = g.double()
    if clamp is not None:
        through = through * ((total >= clamp[0]) & (total <= clamp[1]))
    size = math.sqrt(g.numel())
    for k, x in enumerate(terms):
        near(got.terms[k], COEFS[k] * through, dtype, 2)
        sums = F64 if dtype == F64 else F32
        near(got.coefs[k] / size, (x.double() * through).sum() / size, sums, 2)
    near(dz0, 0.7 * NOISES["sincos"].transpose(g.double(), z0.double(), 17, 50).z0, F32, 2)


def test_backward_computes_only_what_is_needed():
    x, g = make((2, 9), F32), make((2, 9), F32)
    dterms, dcoefs, dnoise, _ = native.step_bwd(
        g, [x, x, x], COEFS[:3], None, None, 0.0,
        needs_terms=[False, True, False], needs_coefs=False, needs_noise_coef=False,
    )  # fmt: skip
    assert dterms[0] is None
    assert dterms[2] is None
    assert dcoefs is None
    assert dnoise is None
    near(dterms[1], -1.2 * g.double())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("name", ["sincos", "signed_roll"])
def test_backward_reads_any_gradient_layout(name, layout):
    shape = (3, 37, 61)
    x, z0, g = make(shape, F32), make(shape, F32), make(shape, F32, layout)
    dz0 = torch.zeros(shape)
    dterms, *_ = native.step_bwd(
        g, [x], [2.0], z0, draw_of(name, z0), 0.7, dz0=dz0,
        needs_terms=[True], needs_coefs=False, needs_noise_coef=False,
    )  # fmt: skip
    near(dterms[0], 2 * g.double())
    near(dz0, 0.7 * NOISES[name].transpose(g.double(), z0.double(), 17, 50).z0)


@pytest.mark.parametrize("name", ["off", "sincos", "signed_roll", "mixture", "philox"])
@pytest.mark.parametrize("count", [0, 1, 2, MAX_TERMS - 1])
@pytest.mark.parametrize(("lam_dtype", "g_dtype"), [(F32, BF16), (F64, F64), (F32, F32)])
def test_adjoint_step(name, count, lam_dtype, g_dtype):
    for shape in [(2, 3, 5), (2, 2500)]:
        lams = [make(shape, lam_dtype) for _ in range(count)]
        g, z0 = make(shape, g_dtype), make(shape, lam_dtype)
        a, b = COEFS[:count], COEFS[: count + 1]
        start = make(shape, lam_dtype)
        dz0 = start.clone()
        lam, mu = native.adjoint_step(
            lams, a, g, 0.6, b, z0, draw_of(name, z0), 0.7, dz0,
            mu_dtype=g_dtype, lam_dtype=lam_dtype,
        )  # fmt: skip
        exact = 0.6 * g.double() + sum(w * v.double() for w, v in zip(a, lams, strict=True))
        next_mu = b[count] * exact + sum(
            w * v.double() for w, v in zip(b[:count], lams, strict=True)
        )
        near(lam, exact, lam_dtype, 2)
        near(mu, next_mu, g_dtype, 2)
        pulled = NOISES[name].transpose(exact, z0.double(), 17, 50).z0
        near(dz0, start.double() + (0 if pulled is None else 0.7 * pulled), lam_dtype, 3)


def test_adjoint_step_without_cotangent_of_the_model():
    lams = [make((2, 9), F32), make((2, 9), F32)]
    lam, mu = native.adjoint_step(
        lams, [1.0, 2.0], None, 0.0, None, None, None, 0.0, None, mu_dtype=F32, lam_dtype=F32
    )
    assert mu is None
    near(lam, lams[0].double() + 2 * lams[1].double())


def test_backward_asks_terms_that_it_does_not_read_for_their_dtype_alone():
    g = make((2, 9), F32)
    terms = [torch.empty(0, dtype=F64), torch.empty(0, dtype=BF16)]
    dterms, *_ = native.step_bwd(g, terms, [0.1, -1.2], needs_terms=[True, True])
    assert [d.dtype for d in dterms] == [F64, BF16]
    torch.testing.assert_close(dterms[0], 0.1 * g.double(), rtol=1e-15, atol=0)
    near(dterms[1], -1.2 * g.double(), BF16)


@pytest.mark.parametrize("count", [0, MAX_TERMS + 1])
def test_counts_of_terms_that_the_loops_do_not_know(count):
    z0, g = make((2, 9), F64), make((2, 9), F64)
    terms, coefs = [make((2, 9), F64) for _ in range(count)], [0.5] * count
    draw = draw_of("sincos", z0)
    dz0, same = torch.zeros_like(z0), torch.zeros_like(z0)
    got = native.step_fwd(terms, coefs, z0, draw, 0.7)
    near(got, reference.step_fwd(terms, coefs, z0, draw, 0.7), F64)
    needs = {"needs_terms": [True] * count, "needs_noise_coef": True}
    mine = native.step_bwd(g, terms, coefs, z0, draw, 0.7, dz0=dz0, **needs)
    exact = reference.step_bwd(g, terms, coefs, z0, draw, 0.7, dz0=same, **needs)
    for one, other in zip(mine.terms, exact.terms, strict=True):
        near(one, other, F64)
    near(mine.noise_coef, exact.noise_coef, F64)
    near(dz0, same, F64)


def test_an_amount_of_noise_for_each_sample():
    x, z0, g = (make((3, 9), F64) for _ in range(3))
    draw, amount = draw_of("mixture", z0), torch.tensor([0.5, 0.0, -2.0])
    got = native.step_fwd([x], [2.0], z0, draw, amount)
    near(got, reference.step_fwd([x], [2.0], z0, draw, amount), F64)
    grads = native.step_bwd(
        g, [x], [2.0], z0, draw, amount, needs_terms=[False], needs_noise_coef=True
    )
    assert grads.noise_coef.shape == (3,)


def test_a_dtype_that_the_loops_do_not_know():
    x = torch.ones(2, 9).to(torch.float8_e4m3fn)
    assert torch.equal(native.step_fwd([x], [2.0], out_dtype=F32), torch.full((2, 9), 2.0))
