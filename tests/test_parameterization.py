# SPDX-License-Identifier: Apache-2.0
"""Every way to read a network's output against its formula, written out by hand."""

import math
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.parameterization import Prediction, model_dtype, parameterize
from support.problems import Gaussian, Mixture, normal

MIXTURE = Mixture(6)
SHAPE = (3, 2, 3)
X = 2 * normal(*SHAPE, seed=1)
SIGMA = torch.tensor([0.05, 0.7, 12.0], dtype=torch.float64)
ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 100, dtype=torch.float64), 0)
TABLE = torch.sqrt((1 - ABAR) / ABAR)  # the levels of the timesteps
KINDS = ("x0", "epsilon", "v", "flow")


def column(c, ndim=3):
    return c.view(-1, *[1] * (ndim - 1))


def network(x, noise, shift=0.0):
    """Smooth in what it is told of the level too; ``shift`` is a conditioning."""
    return torch.tanh(x + column(noise, x.ndim)) + 0.3 * torch.sin(x.flip(-1)) - shift


class Seen(NamedTuple):
    """A network that notes what it is called with."""

    calls: list

    def __call__(self, x, noise, **cond):
        self.calls.append((x, noise, cond))
        return network(x, noise)


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def edm(x, s, sigma_data=0.5):
    total = s**2 + sigma_data**2
    inner = network(x / total.sqrt(), s.log().flatten() / 4)
    return sigma_data**2 / total * x + s * sigma_data / total.sqrt() * inner


def table_timestep(s):
    """The timestep at which log(level), drawn through the points of the table, reaches s."""
    logs = [math.log(level) for level in TABLE.tolist()]
    at = math.log(s)
    for k in range(len(logs) - 1):
        if logs[k] <= at <= logs[k + 1]:
            return k + (at - logs[k]) / (logs[k + 1] - logs[k])
    return 0.0 if at < logs[0] else len(logs) - 1.0


def vp(kind):
    def denoised(x, s):
        abar = 1 / (1 + s**2)
        steps = torch.tensor([table_timestep(v) for v in s.flatten().tolist()], dtype=x.dtype)
        x_vp = abar.sqrt() * x
        out = network(x_vp, steps)
        return {
            "x0": out,
            "epsilon": (x_vp - (1 - abar).sqrt() * out) / abar.sqrt(),
            "v": abar.sqrt() * x_vp - (1 - abar).sqrt() * out,
        }[kind]

    return denoised


def flow(x, s):
    t = s / (1 + s)
    x_t = (1 - t) * x
    return x_t - t * network(x_t, t.flatten())


def plain(kind):
    def denoised(x, s):
        out = network(x, s.flatten())
        if kind == "v":
            return vp_v(x, s, out)
        return out if kind == "x0" else x - s * out

    return denoised


def vp_v(x, s, out):
    """v = a*e - b*x0 of x = x0 + s*e, a = 1/sqrt(1+s^2), b = s*a, solved for x0."""
    a = 1 / torch.sqrt(1 + s**2)
    return a * (a * x - s * out)


FORMULAS = {
    "EDM": (gs.EDM(network), edm),
    "EDM-sigma_data": (gs.EDM(network, sigma_data=1.3), lambda x, s: edm(x, s, 1.3)),
    **{f"VP-{kind}": (gs.VP(network, ABAR, kind), vp(kind)) for kind in ("x0", "epsilon", "v")},
    "Flow": (gs.Flow(network), flow),
    **{f"plain-{kind}": (Prediction(network, kind), plain(kind)) for kind in KINDS},
}
every_formula = pytest.mark.parametrize(
    ("wrapped", "formula"), FORMULAS.values(), ids=list(FORMULAS)
)


@every_formula
def test_the_denoised_sample_is_the_formulas(wrapped, formula):
    assert relative(wrapped(X, SIGMA), formula(X, column(SIGMA))) <= 1e-13


@every_formula
def test_each_sample_has_its_own_level(wrapped, formula):
    together = wrapped(X, SIGMA)
    for k in range(3):
        alone = wrapped(X[k : k + 1], SIGMA[k : k + 1])
        assert relative(together[k : k + 1], alone) <= 1e-14


@every_formula
def test_a_run_reads_the_output_as_the_formula_does(wrapped, formula):
    """The coefficients of a program against the denoiser as a plain callable."""
    levels = gs.schedules.karras(5, sigma_min=0.1, sigma_max=10.0)
    got = gs.sample(wrapped, X, levels, solver="heun")
    expected = gs.sample(lambda x, s: formula(x, column(s)), X, levels, solver="heun")
    assert relative(got, expected) <= 1e-12


@every_formula
def test_gradients_to_the_state_and_to_the_levels_through_a_call(wrapped, formula):
    x, sigma = X.clone().requires_grad_(), SIGMA.clone().requires_grad_()
    assert torch.autograd.gradcheck(wrapped, (x, sigma))


@pytest.mark.parametrize(
    "wrapped",
    [
        pytest.param(gs.EDM(network), id="EDM"),
        pytest.param(gs.VP(network, ABAR), id="VP"),
        pytest.param(gs.Flow(network), id="Flow"),
        pytest.param(gs.Guided(gs.EDM(network), 2.0, {"shift": 1.0}), id="Guided"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 3, 2, 2)], ids=["vectors", "videos"])
def test_states_of_any_rank(wrapped, shape):
    x = normal(*shape)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert wrapped(x, sigma).shape == shape
    alone = torch.cat([wrapped(x[k : k + 1], sigma[k : k + 1]) for k in range(2)])
    assert relative(wrapped(x, sigma), alone) <= 1e-14


def test_a_denoiser_that_is_exact_stays_so_under_every_wrapping():
    """Networks that predict rightly, each in its own terms, all give E[x0 | x]."""
    expected = MIXTURE.denoise(X, SIGMA)

    def vp_network(kind):
        def predict(x_vp, timestep):
            low = timestep.floor().long().clamp(max=len(TABLE) - 2)
            logs = TABLE.log()
            s = torch.exp(logs[low] + (timestep - low) * (logs[low + 1] - logs[low]))
            a = column(1 / torch.sqrt(1 + s**2))
            b = column(s) * a
            clean = MIXTURE.posterior(x_vp, a.flatten(), b.flatten())
            epsilon = (x_vp - a * clean) / b
            return {"x0": clean, "epsilon": epsilon, "v": a * epsilon - b * clean}[kind]

        return predict

    def edm_network(scaled, noise):
        s = column(torch.exp(4 * noise))
        root = torch.sqrt(s**2 + 0.25)
        x = scaled * root
        return (MIXTURE.denoise(x, s.flatten()) - 0.25 / root**2 * x) * root / (0.5 * s)

    wrappings = {
        "EDM": gs.EDM(edm_network, sigma_data=0.5),
        "Flow": gs.Flow(MIXTURE.velocity),
        "epsilon": Prediction(MIXTURE.epsilon, "epsilon"),
        "v": Prediction(MIXTURE.v, "v"),
        **{f"VP-{kind}": gs.VP(vp_network(kind), ABAR, kind) for kind in ("x0", "epsilon", "v")},
    }
    for name, wrapped in wrappings.items():
        assert relative(wrapped(X, SIGMA), expected) <= 1e-11, name
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    native = Prediction(MIXTURE.velocity, "flow")
    assert relative(native(X, t), MIXTURE.posterior(X, 1 - t, t)) <= 1e-13


def test_a_flow_network_driven_by_a_ve_solver_and_natively_solve_one_ode():
    """From one state, at fine steps; the discretisations differ, the solutions do not."""
    data = Gaussian(mean=0.4, std=0.5)
    s, t = 19.0, 0.25
    z0 = normal(2, 4, seed=2)
    levels = torch.logspace(math.log10(s), math.log10(t), 801, dtype=torch.float64)
    ve = gs.sample(gs.Flow(data.velocity), z0, levels, solver="heun")
    assert relative(ve, data.ode(s * z0, s, t)) <= 1e-4
    native = gs.sample(data.velocity, z0, levels / (1 + levels), solver="heun", prediction="flow")
    assert relative(native * (1 + t), data.ode(s * z0, s, t)) <= 1e-4


@pytest.mark.parametrize(
    ("wrap", "scale", "told"),
    [
        pytest.param(
            lambda f: gs.EDM(f, sigma_data=0.5),
            lambda s: 1 / torch.sqrt(s**2 + 0.25),
            lambda s: torch.log(s) / 4,
            id="EDM",
        ),
        pytest.param(lambda f: gs.Flow(f), lambda s: 1 / (1 + s), lambda s: s / (1 + s), id="Flow"),
        pytest.param(
            lambda f: gs.VP(f, ABAR),
            lambda s: 1 / torch.sqrt(1 + s**2),
            lambda s: torch.tensor([table_timestep(v) for v in s.tolist()], dtype=s.dtype),
            id="VP",
        ),
        pytest.param(Prediction, torch.ones_like, lambda s: s, id="plain"),
    ],
)
def test_the_network_sees_the_scaled_state_one_number_a_sample_and_the_conditioning(
    wrap, scale, told
):
    seen = Seen([])
    wrap(seen)(X, SIGMA, label="cat")
    ((x, noise, cond),) = seen.calls
    assert relative(x, column(scale(SIGMA)) * X) <= 1e-14
    assert noise.shape == (3,)
    assert torch.allclose(noise, told(SIGMA), rtol=1e-12, atol=1e-12)
    assert cond == {"label": "cat"}


def test_timesteps_of_the_tables_levels_are_the_integers():
    steps = gs.VP(network, ABAR).timestep(TABLE)
    assert torch.allclose(steps, torch.arange(100, dtype=torch.float64), rtol=0, atol=1e-10)


def test_timesteps_between_are_linear_in_log_sigma():
    low, high = TABLE[40:41], TABLE[41:42]
    for part in (0.25, 0.5, 0.9):
        level = torch.exp((1 - part) * low.log() + part * high.log())
        assert gs.VP(network, ABAR).timestep(level).item() == pytest.approx(40 + part, abs=1e-10)


def test_timesteps_beyond_the_table_are_its_ends():
    outside = torch.tensor([0.0, TABLE[0] / 2, TABLE[-1] * 2], dtype=torch.float64)
    assert gs.VP(network, ABAR).timestep(outside).tolist() == [0.0, 0.0, 99.0]


def test_the_timestep_carries_a_gradient_to_the_level():
    sigma = (0.5 * (TABLE[30] + TABLE[31])).clone().requires_grad_()
    (slope,) = torch.autograd.grad(gs.VP(network, ABAR).timestep(sigma), sigma)
    expected = 1 / (sigma.item() * math.log(TABLE[31] / TABLE[30]))
    assert slope.item() == pytest.approx(expected, rel=1e-12)


def test_timesteps_of_float32_levels_are_computed_in_float64():
    """Levels lie 1e-3 apart in log; a float32 logarithm would be off by 3e-4 timesteps."""
    abar = torch.cumprod(1 - torch.full((1000,), 1e-5, dtype=torch.float64), 0)
    levels = torch.sqrt((1 - abar) / abar)[500:].float()
    seen = Seen([])
    gs.VP(seen, abar)(torch.zeros(500, 2), levels)
    assert torch.allclose(seen.calls[0][1], torch.arange(500.0, 1000.0), rtol=0, atol=1.5e-4)


def guided_by_hand(denoise, scale, x, sigma, cond, unconditional):
    with_cond, without = denoise(x, sigma, **cond), denoise(x, sigma, **{**cond, **unconditional})
    return (1 - scale) * without + scale * with_cond


INNER = {
    "plain": network,
    "EDM": gs.EDM(network),
    "VP-v": gs.VP(network, ABAR, "v"),
    "Flow": gs.Flow(network),
    "epsilon": Prediction(network, "epsilon"),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


@every_inner
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, -0.5])
def test_guidance_combines_two_predictions(inner, scale):
    shift = normal(*SHAPE, seed=3)
    got = gs.Guided(inner, scale, {"shift": 0.25})(X, SIGMA, shift=shift)
    expected = guided_by_hand(inner, scale, X, SIGMA, {"shift": shift}, {"shift": 0.25})
    assert relative(got, expected) <= 1e-13


@every_inner
@pytest.mark.parametrize("memory", ["checkpoint", "store"])
def test_a_guided_run_and_all_its_gradients_are_those_of_the_combination(inner, memory):
    levels = gs.schedules.karras(4, sigma_min=0.1, sigma_max=10.0)

    def gradients(run):
        z0, cond, uncond = (normal(*SHAPE, seed=k).requires_grad_() for k in (4, 5, 6))
        scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        sigmas = levels.clone().requires_grad_()
        x = run(z0, sigmas, scale, {"shift": cond}, {"shift": uncond})
        return x, *torch.autograd.grad(
            (x * normal(*SHAPE, seed=7)).sum(), [z0, sigmas, scale, cond, uncond]
        )

    def ours(z0, sigmas, scale, cond, uncond):
        guided = gs.Guided(inner, scale, uncond)
        return gs.sample(guided, z0, sigmas, solver="dpmpp_2m", cond=cond, memory=memory)

    def by_hand(z0, sigmas, scale, cond, uncond):
        def denoise(x, sigma):
            return guided_by_hand(inner, scale, x, sigma, cond, uncond)

        return gs.sample(denoise, z0, sigmas, solver="dpmpp_2m", memory="store")

    for got, expected in zip(gradients(ours), gradients(by_hand), strict=True):
        assert relative(got, expected) <= 1e-11


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_gradient_to_the_guidance_scale_is_the_difference_quotient(scale):
    levels = gs.schedules.karras(4, sigma_min=0.1, sigma_max=10.0, final="zero")

    def loss(w):
        guided = gs.Guided(gs.EDM(network), w, {"shift": 0.5})
        return gs.sample(guided, X, levels, solver="heun").square().sum()

    w = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(w), w)
    expected = (loss(scale + 1e-5) - loss(scale - 1e-5)).item() / 2e-5
    assert got.item() == pytest.approx(expected, rel=1e-7)


def test_a_float32_scale_receives_its_gradient_in_float32():
    w = torch.tensor(2.0, requires_grad=True)
    x = gs.sample(gs.Guided(gs.EDM(network), w, {"shift": 0.5}), X, [2.0, 1.0])
    (got,) = torch.autograd.grad(x.sum(), w)
    assert got.dtype == torch.float32
    assert got.isfinite()


def test_the_unconditional_call_keeps_what_is_not_replaced():
    seen = Seen([])
    given = {"text": "prompt", "size": 64}
    gs.sample(gs.Guided(seen, 2.0, {"text": None}), X, [2.0, 1.0], cond=given)
    conds = [cond for _, _, cond in seen.calls]
    assert conds == [{"text": None, "size": 64}, {"text": "prompt", "size": 64}]
    assert given == {"text": "prompt", "size": 64}


class Net(nn.Module):
    """A network that notes the dtypes it is called with."""

    def __init__(self, dtype, second=None):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=dtype)
        self.second = nn.Linear(4, 4, dtype=second or dtype)
        self.seen = set()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))

    def forward(self, x, noise):
        self.seen.add((x.dtype, noise.dtype))
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.second(hidden.to(self.second.weight.dtype))


def run_dtypes(denoiser, z0_dtype, **kwargs):
    """Dtypes of the states, of the predictions told, and of the result."""
    told = []
    z0 = normal(2, 4, dtype=torch.float32).to(z0_dtype)
    x = gs.sample(denoiser, z0, [3.0, 1.0, 0.5], solver="heun", callback=told.append, **kwargs)
    assert len(told) == 2
    return {info.x.dtype for info in told}, {info.denoised.dtype for info in told}, x.dtype


WRAPS = {
    "plain": lambda net: net,
    "EDM": gs.EDM,
    "VP": lambda net: gs.VP(net, ABAR),
    "Flow": gs.Flow,
    "Guided": lambda net: gs.Guided(gs.EDM(net), 2.0, {}),
}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize(
    ("net", "z0", "model_input", "level", "state"),
    [
        pytest.param(BF16, F32, BF16, F32, F32, id="bf16-net-f32-z0"),
        pytest.param(BF16, BF16, BF16, F32, F32, id="bf16-net-bf16-z0"),
        pytest.param(F32, BF16, F32, F32, F32, id="f32-net-bf16-z0"),
        pytest.param(F32, F64, F32, F32, F64, id="f32-net-f64-z0"),
        pytest.param(F64, F32, F64, F64, F32, id="f64-net-f32-z0"),
    ],
)
def test_the_network_runs_in_its_own_dtype_and_the_state_in_float32_at_least(
    wrap, net, z0, model_input, level, state
):
    network = Net(net)
    states, told, result = run_dtypes(wrap(network), z0)
    assert network.seen == {(model_input, level)}
    assert states == {state}
    assert told == {state}
    assert result == z0


def test_the_state_dtype_can_be_chosen():
    network = Net(F32)
    states, _, result = run_dtypes(network, F32, state_dtype=F64)
    assert (states, result, network.seen) == ({F64}, F32, {(F32, F32)})


def test_a_network_of_two_dtypes_is_called_in_that_of_z0():
    network = Net(F32, second=BF16)
    run_dtypes(network, F16)
    assert network.seen == {(F16, F32)}


def test_a_function_is_called_in_the_dtype_of_z0():
    assert model_dtype(parameterize(lambda x, s: x, "x0"), torch.zeros(1, 2, dtype=BF16)) == BF16


def test_the_state_is_not_rounded_between_calls_of_a_bf16_network():
    """With D = 0 the state falls by t/s each step; bf16 would be off by 1e-3 and more."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=BF16))

        def forward(self, x, sigma):
            assert x.dtype == BF16
            return x * self.weight

    z0 = normal(2, 4, dtype=F32).to(BF16)
    levels = gs.schedules.karras(40, sigma_min=0.01, sigma_max=10.0)
    told = []
    gs.sample(Zero(), z0, levels, callback=told.append)
    for info in told:
        assert relative(info.x.double(), info.sigma * z0.double()) <= 1e-5


@pytest.mark.parametrize(
    "wrapped",
    [
        pytest.param(gs.EDM(network), id="EDM"),
        pytest.param(gs.VP(network, ABAR, "v"), id="VP"),
        pytest.param(gs.Flow(network), id="Flow"),
        pytest.param(Prediction(network, "epsilon"), id="epsilon"),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(F32, 2e-6), (BF16, 0.02)], ids=["f32", "bf16"])
def test_a_call_returns_the_dtype_of_x(wrapped, dtype, bound):
    x = X.to(dtype)
    got = wrapped(x, SIGMA.to(F32))
    assert got.dtype == dtype
    assert relative(got.double(), wrapped(x.double(), SIGMA)) <= bound


ERRORS = {
    "EDM-zero": (
        lambda: gs.EDM(network, sigma_data=0.0),
        ValueError,
        "EDM: sigma_data must be positive, got 0.0",
    ),
    "EDM-negative": (
        lambda: gs.EDM(network, sigma_data=-1.0),
        ValueError,
        "EDM: sigma_data must be positive, got -1.0",
    ),
    "EDM-nan": (
        lambda: gs.EDM(network, sigma_data=math.nan),
        ValueError,
        "EDM: sigma_data must be a finite number, got nan",
    ),
    "EDM-text": (
        lambda: gs.EDM(network, sigma_data="0.5"),
        TypeError,
        "EDM: sigma_data must be a real number, got str",
    ),
    "VP-kind": (
        lambda: gs.VP(network, ABAR, "eps"),
        ValueError,
        "VP: prediction must be one of epsilon, v, x0, got 'eps'; did you mean 'epsilon'?",
    ),
    "VP-list": (
        lambda: gs.VP(network, ABAR.tolist()),
        TypeError,
        "VP: alphas_cumprod must be a torch.Tensor, got list",
    ),
    "VP-integers": (
        lambda: gs.VP(network, torch.tensor([3, 2])),
        ValueError,
        "VP: alphas_cumprod must have a floating-point dtype, got torch.int64",
    ),
    "VP-shape": (
        lambda: gs.VP(network, ABAR[None]),
        ValueError,
        "VP: alphas_cumprod must have shape [T], T >= 2, got [1, 100]",
    ),
    "VP-one": (
        lambda: gs.VP(network, ABAR[:1]),
        ValueError,
        "VP: alphas_cumprod must have shape [T], T >= 2, got [1]",
    ),
    "VP-increasing": (
        lambda: gs.VP(network, ABAR.flip(0)),
        ValueError,
        "VP: alphas_cumprod must decrease within (0, 1), got",
    ),
    "VP-equal": (
        lambda: gs.VP(network, torch.tensor([0.5, 0.5])),
        ValueError,
        "VP: alphas_cumprod must decrease within (0, 1), got",
    ),
    "VP-passes-0": (
        lambda: gs.VP(network, torch.tensor([0.5, 0.0, -0.1])),
        ValueError,
        "VP: alphas_cumprod must decrease within (0, 1), got",
    ),
    "VP-reaches-1": (
        lambda: gs.VP(network, torch.tensor([1.0, 0.5])),
        ValueError,
        "VP: alphas_cumprod must decrease within (0, 1), got",
    ),
    "VP-nan": (
        lambda: gs.VP(network, torch.tensor([0.9, math.nan])),
        ValueError,
        "VP: alphas_cumprod must decrease within (0, 1), got",
    ),
    "Guided-nan": (
        lambda: gs.Guided(network, math.nan, {}),
        ValueError,
        "Guided: scale must be a finite number, got nan",
    ),
    "Guided-vector": (
        lambda: gs.Guided(network, torch.ones(2, 3), {}),
        ValueError,
        "Guided: scale must have shape [] or [N], one a step, got [2, 3]",
    ),
    "Guided-integer": (
        lambda: gs.Guided(network, torch.tensor(2), {}),
        ValueError,
        "Guided: scale must have a floating-point dtype, got torch.int64",
    ),
    "Guided-inner": (
        lambda: gs.Guided(3, 2.0, {}),
        TypeError,
        "denoiser must be callable as denoiser(x, sigma, **cond), got int",
    ),
    "prediction-of-a-wrapper": (
        lambda: gs.sample(gs.EDM(network), X, [2.0, 1.0], prediction="epsilon"),
        ValueError,
        "prediction must be 'x0' for a denoiser wrapped in EDM, which returns x0, got 'epsilon'",
    ),
    "prediction-unknown": (
        lambda: gs.sample(network, X, [2.0, 1.0], prediction="eps"),
        ValueError,
        "prediction must be one of epsilon, flow, v, x0, got 'eps'; did you mean 'epsilon'?",
    ),
    "denoiser-none": (
        lambda: gs.sample(None, X, [2.0, 1.0]),
        TypeError,
        "denoiser must be callable as denoiser(x, sigma, **cond), got NoneType",
    ),
    "output-shape": (
        lambda: gs.sample(lambda x, s: x[:, :1], X, [2.0, 1.0]),
        ValueError,
        "denoiser: the output at step 0 must have shape [3, 2, 3], got [3, 1, 3]",
    ),
    "output-integers": (
        lambda: gs.sample(lambda x, s: x.long(), X, [2.0, 1.0]),
        ValueError,
        "denoiser: the output at step 0 must have a floating-point dtype, got torch.int64",
    ),
    "output-tuple": (
        lambda: gs.sample(lambda x, s: (x,), X, [2.0, 1.0]),
        TypeError,
        "denoiser: the output at step 0 must be a torch.Tensor, got tuple",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused_with_its_name(case):
    attempt, kind, message = ERRORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        attempt()
