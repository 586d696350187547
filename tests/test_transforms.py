# SPDX-License-Identifier: Apache-2.0
"""Derivatives beside plain backward: forward mode, torch.func, vmap and batched cotangents.

The oracle is the central difference of plain runs, and for batches a loop over their members.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler.engine.recomputation import recomputed
from support.problems import Mixture, normal
from support.runs import leaf
from support.tiers import pairs

# Torch itself warns of its own use of torch.jit where it loads forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

SHAPE = (3, 4)
TERMS = [normal(*SHAPE, seed=k) for k in range(2)]
Z0 = normal(*SHAPE, seed=9)
COEFS = torch.tensor([0.3, 0.7], dtype=torch.float64)
AMOUNT = torch.tensor(0.4, dtype=torch.float64)
IMAGE = (2, 2, 3, 3)
BACKENDS = ["reference", "cpu"]


def step(noise, backend, x, y, z0, *learned):
    coefs, amount = learned or ([0.1, 0.2], 0.4)
    return gs.ops.step([x, y], coefs, z0, noise, 2, 7, amount, backend=backend)


def ancestral(backend, x, output, noise):
    numbers = [1.0, 0.5, 0.4, 0.6, -0.2, -0.5]
    return gs.ops.ancestral_step(x, output, numbers, noise, clamp=(-1, 1), backend=backend)


def pair(backend, x0, t, x1):
    x_t, _, v = gs.ops.flow_pair(x0, t, x1, backend=backend)
    return x_t + 2 * v


def ops():
    """Each op by name: a function of its backend and of tensors, and those tensors."""
    times = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    images = [normal(*IMAGE), normal(2, 4, 3, 3, seed=1), normal(*IMAGE, seed=2)]
    found = {
        "reparameterize": (
            lambda backend, *x: gs.ops.reparameterize(*x, backend=backend),
            [*TERMS, Z0],
        ),
        "ancestral_step": (ancestral, images),
        "flow_pair": (pair, [TERMS[0], times, Z0]),
    }
    for name, noise in {
        "roll": noises.SignedRoll(),
        "sincos": noises.SinCos(),
        "philox": noises.Philox(3),
    }.items():
        found[f"step, {name}"] = (partial(step, noise), [*TERMS, Z0])
        found[f"step that learns, {name}"] = (partial(step, noise), [*TERMS, Z0, COEFS, AMOUNT])
    return found


OPS = ops()
every_op = pytest.mark.parametrize("backend", BACKENDS)


def directions(inputs):
    return [normal(*x.shape, seed=50 + k) for k, x in enumerate(inputs)]


def difference(function, inputs, tangents, h=1e-5):
    """The derivative along the tangents, to fourth order in h."""

    def at(t):
        with torch.no_grad():
            moved = [x + t * h * v for x, v in zip(inputs, tangents, strict=True)]
            return function(*moved)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


def close(got, expected, tolerance=1e-8):
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def by_dual_numbers(function, inputs, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


@pytest.mark.parametrize("op", OPS)
@every_op
def test_an_op_has_its_derivative_in_forward_mode(op, backend):
    function, inputs = OPS[op]
    run, tangents = partial(function, backend), directions(inputs)
    expected = difference(run, inputs, tangents)
    value, tangent = torch.func.jvp(run, tuple(inputs), tuple(tangents))
    close(value, run(*inputs), 1e-14)
    close(tangent, expected)
    close(by_dual_numbers(run, inputs, tangents), expected)
    leaves = [leaf(x) for x in inputs]  # parameters, as a rule
    close(by_dual_numbers(run, leaves, tangents), expected)


@pytest.mark.parametrize("op", OPS)
@every_op
def test_an_op_over_a_batch_of_arguments_and_of_cotangents(op, backend):
    function, inputs = OPS[op]
    run = partial(function, backend)
    batches = [torch.stack([x, 0.5 * x]) for x in inputs]
    got = torch.func.vmap(run)(*batches)
    close(got, torch.stack([run(*(x[k] for x in batches)) for k in range(2)]), 1e-14)

    leaves = [leaf(x) for x in inputs]
    result = run(*leaves)
    cotangents = normal(3, *result.shape, seed=70)
    grad = partial(torch.autograd.grad, result, leaves, retain_graph=True)
    batched = grad(cotangents, is_grads_batched=True)
    for k, found in enumerate(batched):
        close(found, torch.stack([grad(g)[k] for g in cotangents]), 1e-13)


SIGMAS = torch.tensor([3.0, 1.3, 0.7, 0.3, 0.0], dtype=torch.float64)
MIXTURE = Mixture(SHAPE[1])
GAIN = torch.tensor(0.9, dtype=torch.float64)
NETWORK = nn.Linear(SHAPE[1], SHAPE[1], dtype=torch.float64)
WEIGHT = 0.3 * normal(SHAPE[1], SHAPE[1], seed=4)


def denoise(x, sigma, gain=1.0):
    return gain * MIXTURE.denoise(x, sigma)


def of_parameters(weight, **options):
    def called(x, sigma):
        return torch.tanh(torch.func.functional_call(NETWORK, {"weight": weight}, (x,)))

    return gs.sample(called, Z0, SIGMAS, **options)


def given(tensor, **options):
    count = 6 if options["solver"] == "dpmpp_sde" else 3
    noise = noises.Given([(k + 1) * tensor for k in range(count)])
    return gs.sample(denoise, Z0, SIGMAS, **options | {"noise": noise})


def guided(scale, **options):
    model = gs.Guided(denoise, scale, {"gain": 0.5 * GAIN})
    return gs.sample(model, Z0, SIGMAS, cond={"gain": GAIN}, **options)


def churned(amount, **options):
    options |= {"solver": "heun", "churn": gs.Churn(amount, s_noise=1.1)}
    return gs.sample(denoise, Z0, SIGMAS, **options)


def waved(numbers, **options):
    options |= {"noise": noises.SinCos(*numbers)}
    return gs.sample(denoise, Z0, SIGMAS, **options)


TARGETS = {
    "z0": (lambda z0, **options: gs.sample(denoise, z0, SIGMAS, **options), Z0),
    "start": (lambda x, **options: gs.sample(denoise, Z0, SIGMAS, start=x, **options), 3 * Z0),
    "cond": (
        lambda gain, **options: gs.sample(denoise, Z0, SIGMAS, cond={"gain": gain}, **options),
        GAIN,
    ),
    "parameters": (of_parameters, WEIGHT),
    "levels": (
        lambda s, **options: gs.sample(denoise, Z0, torch.cat([s, SIGMAS[-1:]]), **options),
        SIGMAS[:-1],
    ),
    "eta": (lambda eta, **options: gs.sample(denoise, Z0, SIGMAS, eta=eta, **options), GAIN),
    "guidance": (guided, 2 * GAIN),
    "guidance by step": (guided, 1 + normal(4)),
    "churn": (churned, GAIN),
    "sincos": (waved, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)),
    "given": (given, normal(*SHAPE, seed=8)),
}
STOCHASTIC = {"solver": "euler_ancestral", "noise": noises.SignedRoll()}


@pairs(
    target=list(TARGETS),
    solver=["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"],
    noise=[noises.SignedRoll(), noises.SinCos()],
)
def test_a_run_has_its_derivative_in_forward_mode(target, solver, noise):
    function, x = TARGETS[target]
    run = partial(function, solver=solver, noise=noise, memory="store")
    (tangent,) = directions([x])
    expected = difference(run, [x], [tangent], h=1e-4)
    value, found = torch.func.jvp(run, (x,), (tangent,))
    close(value, run(x), 1e-13)
    close(found, expected, 1e-7)
    close(by_dual_numbers(run, [x], [tangent]), expected, 1e-7)
    with torch.no_grad():
        close(torch.func.jvp(run, (x,), (tangent,))[1], expected, 1e-7)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_under_grad_and_vmap(target):
    function, x = TARGETS[target]
    run = partial(function, **STOCHASTIC, memory="store")
    (tangent,) = directions([x])
    gradient = torch.func.grad(lambda x: run(x).sum())(x)
    close((gradient * tangent).sum(), difference(run, [x], [tangent], h=1e-4).sum(), 1e-7)
    if target not in ("z0", "start", "cond", "parameters", "given"):
        return  # a number is one for the whole run
    batch = torch.stack([x, 0.5 * x])
    close(torch.func.vmap(run)(batch), torch.stack([run(x) for x in batch]), 1e-13)


def test_hessian_by_forward_over_reverse():
    def loss(z0):
        return gs.sample(denoise, z0, SIGMAS, **STOCHASTIC, memory="store").square().sum()

    tangent = normal(*SHAPE, seed=60)
    _, product = torch.func.jvp(torch.func.grad(loss), (Z0,), (tangent,))

    def gradient(z0):
        with torch.enable_grad():
            x = leaf(z0)
            return torch.autograd.grad(loss(x), x)[0]

    close(product, difference(gradient, [Z0], [tangent], h=1e-4), 1e-7)


RECOMPUTING = ["auto", "checkpoint", "offload", "revolve:2", "reversible", "truncated:2"]


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_what_recomputes_names_the_strategy_that_serves(memory):
    calls = 0

    def counted(x, sigma):
        nonlocal calls
        calls += 1
        return 0.5 * x

    def run(z0):
        return gs.sample(counted, z0, SIGMAS, solver="midpoint_reversible", memory=memory)

    by_name = pytest.raises(ValueError, match=r"memory must be 'store' under .*, got '" + memory)
    with by_name:
        torch.func.jvp(run, (Z0,), (Z0,))
    with by_name, torch.no_grad():
        torch.func.jvp(run, (Z0,), (Z0,))
    with by_name:
        torch.func.grad(lambda z0: run(z0).sum())(Z0)
    with by_name:
        torch.func.vmap(run)(torch.stack([Z0, Z0]))
    with by_name, forward_ad.dual_level():
        run(forward_ad.make_dual(Z0, Z0))
    assert calls == 0


def test_batched_cotangents_of_what_recomputes():
    z0, named = leaf(Z0), pytest.raises(ValueError, match="memory must be 'store' under")
    cotangents = normal(3, *SHAPE)
    x = gs.sample(denoise, z0, SIGMAS, memory="checkpoint")
    with named:
        torch.autograd.grad(x, z0, cotangents, is_grads_batched=True, retain_graph=True)
    one = [torch.autograd.grad(x, z0, g, retain_graph=True)[0] for g in cotangents[:1]]
    assert one[0].isfinite().all()  # the run itself has its gradient still
    y = recomputed(torch.sin, [z0])
    with named:
        torch.autograd.grad(y, z0, cotangents, is_grads_batched=True)


def test_batched_cotangents_of_a_stored_run():
    z0 = leaf(Z0)
    x = gs.sample(denoise, z0, SIGMAS, **STOCHASTIC, memory="store")
    cotangents = normal(3, *SHAPE)
    grad = partial(torch.autograd.grad, x, z0, retain_graph=True)
    (batched,) = grad(cotangents, is_grads_batched=True)
    close(batched, torch.stack([grad(g)[0] for g in cotangents]), 1e-13)


def _by_level(x):
    return gs.sample(denoise, Z0, x * SIGMAS, memory="store")


def _by_amount(x):
    return gs.sample(denoise, Z0, SIGMAS, solver="euler_ancestral", eta=x, memory="store")


def _by_churn(x):
    churn = gs.Churn(1.0, s_noise=x)
    return gs.sample(denoise, Z0, SIGMAS, solver="heun", churn=churn, memory="store")


def _by_scale(x):
    guided = gs.Guided(lambda y, sigma, share: share * denoise(y, sigma), x, {"share": 0.5})
    return gs.sample(guided, Z0, SIGMAS, cond={"share": 1.0}, memory="store")


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (_by_level, "sigmas"),
        (_by_amount, "euler_ancestral: eta"),
        (_by_churn, "Churn: s_noise"),
        (_by_scale, "Guided: scale"),
    ],
)
def test_numbers_of_a_run_that_vmap_maps_are_refused_by_name(run, name):
    mapped = f"{name} must be the same for all that vmap maps over"
    several = torch.tensor([0.5, 0.9], dtype=torch.float64)
    with pytest.raises(ValueError, match=mapped):
        torch.func.vmap(run)(several)
    with pytest.raises(ValueError, match=mapped):
        torch.func.vmap(torch.func.grad(lambda x: run(x).sum()))(several)
    # one of them at a time is a run like others
    assert torch.func.grad(lambda x: run(x).sum())(several[0]).isfinite()


@pytest.mark.parametrize("transform", ["jvp", "vmap", "dual"])
def test_an_out_that_a_transform_would_not_see_is_refused(transform):
    def step(x):
        return gs.ops.step([x, Z0], [1.0, 2.0], out=torch.empty_like(Z0))

    named = pytest.raises(ValueError, match=r"step: out must be None under torch\.func")
    if transform == "jvp":
        with named:
            torch.func.jvp(step, (Z0,), (Z0,))
    elif transform == "vmap":
        with named:
            torch.func.vmap(step)(torch.stack([Z0, Z0]))
    else:
        with named, forward_ad.dual_level():
            step(forward_ad.make_dual(Z0, Z0))
    with forward_ad.dual_level():  # nothing that it reads has a tangent
        assert torch.equal(step(Z0), 3 * Z0)


def test_a_call_that_recomputes_is_refused():
    with pytest.raises(ValueError, match="the model: memory must be 'store'"):
        torch.func.jvp(lambda x: recomputed(torch.sin, [x]), (Z0,), (Z0,))
