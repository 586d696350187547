# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend, and whole runs on the Triton kernels beside plain torch."""

import pytest
import torch

import gradsampler as gs
from gradsampler.ops import backends
from gradsampler.ops.recorded import differentiable
from support.noises import SOURCES
from support.runs import SOLVERS
from support.strategies import STRATEGIES
from support.tiers import few, pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    backends.available()["triton"].startswith("import failed"), reason="needs triton"
)


def network(x, sigma, shift):
    return torch.tanh(x) * 0.4 + 0.5 * x / (1 + sigma[:, None] ** 2) + shift


def run(backend, solver, noise, memory, denoiser=network, prediction="x0"):
    """A sample and its gradients to z0, the conditioning and the levels."""
    generator = torch.Generator().manual_seed(0)
    z0, shift = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    z0, shift = z0.to(DEVICE).requires_grad_(), shift.to(DEVICE).requires_grad_()
    levels = gs.schedules.karras(3, 0.1, 3.0, final="zero").requires_grad_()
    churn = None if gs.solvers.resolve(solver).stochastic else gs.Churn(1.0)
    x = gs.sample(
        denoiser,
        z0,
        levels,
        solver=solver,
        prediction=prediction,
        noise=noise,
        churn=churn,
        eta=0.5 if solver == "ddim" else None,
        cond={"shift": shift},
        memory=memory,
        backend=backend,
    )
    return x, *torch.autograd.grad((x**3).sum(), (z0, shift, levels))


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("g", [None, "dense", "strided", "half"])
def test_cotangents_of_few_elements(g, count, dtype):
    # By torch's own operations, where the extension takes the others.
    generator = torch.Generator().manual_seed(0)
    if g is None and count == 0:
        return
    shape, backend = (5, 7), backends.choose(None, torch.device("cpu"))
    lams = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
    model = None if g is None else torch.randn(shape, generator=generator, dtype=dtype)
    if g == "strided":
        model = torch.cat((model, model), 1)[:, :7]
    if g == "half":
        model = model.bfloat16()
    for scale in (1.0, -0.3):
        for b in (None, [0.0] * count + [0.4], [*[0.5, 0.0, 2.0][:count], 0.4]):
            numbers = ([0.3, -1.2, 0.7][:count], model, scale, b)
            options = {"lam_dtype": dtype, "mu_dtype": None if b is None else dtype}
            found = backend.adjoint(lams, *numbers, **options)
            wide = [lam.double() for lam in lams]
            exact = 0 if model is None else scale * model.double()
            exact = exact + sum(c * lam for c, lam in zip(numbers[0], wide, strict=True))
            close(found[0], exact)
            if b is None:
                assert found[1] is None
            else:
                close(
                    found[1],
                    b[-1] * exact + sum(c * lam for c, lam in zip(b[:-1], wide, strict=True)),
                )


def close(got, exact):
    tolerance = 1e-12 if got.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@needs_triton
@pytest.mark.parametrize("solver", few(SOLVERS, "euler", "heun", "dpmpp_2m_sde"))
def test_every_solver_runs_on_the_kernels(solver):
    noise = gs.noise.SinCos()
    expected = run("reference", solver, noise, "store")
    assert_same(run("triton", solver, noise, "checkpoint"), expected)


@needs_triton
@pairs(kind=SOURCES, memory=STRATEGIES)
def test_every_noise_runs_on_the_kernels(kind, memory, tmp_path):
    noise = SOURCES[kind]
    expected = run("reference", "euler_ancestral", noise, "store")
    assert_same(run("triton", "euler_ancestral", noise, STRATEGIES[memory](tmp_path)), expected)


@pairs(kind=SOURCES, name=["reference", "cpu", "triton", "cuda"])
def test_steps_are_undone_on_every_backend(kind, name):
    if not backends.present(name) or name == {"cpu": "cuda", "cuda": "cpu"}[DEVICE.type]:
        pytest.skip(f"no {name} for {DEVICE}")
    noise = SOURCES[kind]
    expected = run("reference", "midpoint_reversible", noise, "store")
    # An amplitude that takes long integers, whose rounding is below the tolerance.
    memory = gs.memory.Reversible(amplitude=2.0**12)
    assert_same(run(name, "midpoint_reversible", noise, memory), expected)


@needs_triton
def test_guidance_and_preconditioning_run_on_the_kernels():
    def edm(x, noise, shift):
        return torch.tanh(x + shift) + 0.1 * noise[:, None]

    denoiser = gs.Guided(gs.EDM(edm, 0.5), 1.7, {"shift": 0.0})
    expected = run("reference", "dpmpp_2m", gs.noise.SinCos(), "store", denoiser)
    assert_same(run("triton", "dpmpp_2m", gs.noise.SinCos(), "checkpoint", denoiser), expected)


@needs_triton
def test_a_bfloat16_network_gets_its_input_from_the_same_launch():
    seen = []

    def half(x, noise):
        seen.append(x.dtype)
        return torch.tanh(x.float()).to(torch.bfloat16)

    z0 = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    samples = [
        gs.sample(gs.EDM(half), z0, gs.schedules.karras(4), backend=name).float()
        for name in ("reference", "triton")
    ]
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(*samples, rtol=2e-2, atol=2e-2)


def test_the_reference_is_always_there():
    assert backends.available()["reference"] == f"torch {torch.__version__}"
    assert backends.choose("reference", torch.device("cpu")) is backends.REFERENCE


def test_an_unknown_backend_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"backend must be one of .*reference.* did you mean"):
        backends.choose("referense", torch.device("cpu"))


@needs_triton
def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1"):
        backends.choose("triton", torch.device("cpu"))


@needs_triton
def test_triton_is_the_default_on_a_gpu():
    assert backends.choose(None, torch.device("cuda")).name == "triton"


@pytest.mark.parametrize("size", [1, 255, 2**14, 2**14 + 1])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_of_a_run_in_few_elements_and_in_many(size, count, dtype):
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(1, size, generator=generator, dtype=dtype) for _ in range(count)]
    coefs = [0.5 - 0.7 * k for k in range(count)]
    exact = sum(c * x.double() for c, x in zip(coefs, terms, strict=True))
    backend = backends.choose(None, torch.device("cpu"))
    x, scaled = backend.step(
        terms, coefs, out_dtype=dtype, model_scale=0.3, model_dtype=torch.float32
    )
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(x.double(), exact, rtol=tolerance, atol=tolerance * count)
    assert (x.dtype, scaled.dtype) == (dtype, torch.float32)
    assert torch.equal(scaled, (0.3 * x).float())
    # The same bits where only one of the results is asked for, and under autograd.
    assert torch.equal(backend.step(terms, coefs, out_dtype=dtype)[0], x)
    asking = [y.clone().requires_grad_() for y in terms]
    recorded = differentiable(backend).step(asking, coefs, out_dtype=dtype)[0]
    assert torch.equal(recorded, x)
    g = torch.randn(1, size, generator=generator, dtype=dtype)
    for c, found in zip(coefs, torch.autograd.grad(recorded, asking, g), strict=True):
        torch.testing.assert_close(found, c * g)


def test_a_step_of_few_elements_is_laid_out_as_one_of_many():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    backend = backends.choose(None, torch.device("cpu"))
    assert backend.step([x], [2.0], out_dtype=torch.float32)[0].is_contiguous()
