# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: argument, what was expected, what came; before any model call where it can
be known before, and with everything of the caller's left as it was.
"""

import math
import re
from typing import NamedTuple

import pytest
import torch

import gradsampler as gs
from support.problems import normal
from support.runs import LEVELS, levels

SIGMAS = levels(LEVELS)  # 3 steps, so 3 injections of a stochastic run
TIMES = levels([0.9, 0.5, 0.2])
NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    """Arguments that replace the good ones, and words that the message must contain."""

    options: dict
    words: tuple[str, ...]
    error: type[Exception] | tuple[type[Exception], ...] = ValueError
    calls: int = 0  # model calls until it can be known


def bad(*words, error=ValueError, calls=0, **options):
    return Case(options, words, error, calls)


def tanh(x, sigma, **cond):
    return torch.tanh(x)


def meta(*shape):
    return torch.zeros(*shape, dtype=torch.float64, device="meta")


def given(*shapes):
    return gs.noise.Given([torch.zeros(*shape, dtype=torch.float64) for shape in shapes])


GIVEN3 = [normal(2, 3)] * 3
ANCESTRAL = {"solver": "euler_ancestral"}

CASES = {
    # z0
    "z0-int": bad("z0", "floating", "int64", z0=torch.ones(2, 3, dtype=torch.int64)),
    "z0-bool": bad("z0", "floating", "bool", z0=torch.ones(2, 3, dtype=torch.bool)),
    "z0-complex": bad("z0", "floating", "complex64", z0=torch.ones(2, 3, dtype=torch.complex64)),
    "z0-0d": bad("z0", "[B, *state]", "[]", z0=torch.ones(())),
    "z0-1d": bad("z0", "[B, *state]", "[3]", z0=torch.ones(3)),
    "z0-no-samples": bad("z0", "element", "[0, 3]", z0=torch.ones(0, 3)),
    "z0-no-state": bad("z0", "element", "[2, 0]", z0=torch.ones(2, 0)),
    "z0-list": bad("z0", "Tensor", "list", z0=[[0.0, 1.0]], error=TypeError),
    "z0-none": bad("z0", "Tensor", "NoneType", z0=None, error=TypeError),
    # sigmas
    "sigmas-increasing": bad(
        "sigmas", "decrease", "sigmas[1] = 1.0", "sigmas[2] = 2.0", sigmas=levels([3, 1, 2])
    ),
    "sigmas-equal": bad("sigmas", "decrease", "1.0", sigmas=levels([3, 1, 1])),
    "sigmas-nan": bad("sigmas", "finite", "nan", sigmas=levels([3, NAN, 1])),
    "sigmas-inf": bad("sigmas", "finite", "inf", sigmas=levels([INF, 2, 1])),
    "sigmas-negative": bad("sigmas", "at least 0", "-1.0", sigmas=levels([3, 1, -1])),
    "sigmas-no-step": bad("sigmas", "[N+1]", "[1]", sigmas=levels([3])),
    "sigmas-empty": bad("sigmas", "[N+1]", "[0]", sigmas=levels([])),
    "sigmas-empty-list": bad("sigmas", "[N+1]", "[0]", sigmas=[]),
    "sigmas-scalar": bad("sigmas", "[N+1]", "[]", sigmas=levels(3.0)),
    "sigmas-2d": bad("sigmas", "[N+1]", "[1, 4]", sigmas=SIGMAS[None]),
    "sigmas-complex": bad("sigmas", "complex", sigmas=SIGMAS.to(torch.complex128)),
    "sigmas-words": bad("sigmas", sigmas=["high", "low"], error=(ValueError, TypeError)),
    "sigmas-none": bad("sigmas", "None", sigmas=None, error=(ValueError, TypeError)),
    "sigmas-meta": bad("sigmas", "meta", sigmas=meta(4)),
    "times-above-one": bad(
        "sigmas", "flow times", "at most 1", "1.5", sigmas=levels([1.5, 0.5]), prediction="flow"
    ),
    # names
    "solver-misspelt": bad(
        "solver", "'eulr'", "did you mean 'euler'", *gs.solvers.names(), solver="eulr"
    ),
    "solver-nothing-near": bad("solver", "'zzz'", *gs.solvers.names(), solver="zzz"),
    "solver-number": bad("solver", "int", solver=3, error=TypeError),
    "solver-class": bad("solver", solver=gs.solvers.Euler, error=TypeError),
    "prediction-misspelt": bad(
        "prediction", "'epsilom'", "'epsilon'", "x0", "v", "flow", prediction="epsilom"
    ),
    "prediction-none": bad("prediction", "NoneType", prediction=None, error=TypeError),
    "memory-misspelt": bad(
        "memory", "'chekpoint'", "did you mean 'checkpoint'", *gs.memory.names(), memory="chekpoint"
    ),
    "memory-class": bad("memory", memory=gs.memory.Store, error=TypeError),
    "backend-misspelt": bad("backend", "'referenc'", "'reference'", backend="referenc"),
    "backend-number": bad("backend", "int", backend=1, error=TypeError),
    # options of solvers
    "eta-without-use": bad("eta", "Euler", "0.5", eta=0.5),
    "s_noise-without-use": bad("s_noise", "Heun", "1.1", solver="heun", s_noise=1.1),
    "eta-negative": bad("eta", "at least 0", "-1", solver="euler_ancestral", eta=-1.0),
    "eta-nan": bad("eta", "finite", "nan", solver="dpmpp_2m_sde", eta=NAN),
    "eta-word": bad("eta", "real number", "str", solver="ddim", eta="1", error=TypeError),
    "eta-above-one": bad("eta", "at most 1", "1.5", solver="ddim", eta=1.5),
    "s_noise-negative": bad("s_noise", "at least 0", "-2", solver="ddpm", s_noise=-2.0),
    "churn-with-noise-of-its-own": bad(
        "churn", "EulerAncestral", "noise", solver="euler_ancestral", churn=gs.Churn(1.0)
    ),
    "churn-in-flow-time": bad(
        "churn", "flow", sigmas=TIMES, prediction="flow", churn=gs.Churn(1.0)
    ),
    "churn-number": bad("churn", "Churn", "float", churn=40.0, error=TypeError),
    "solver-not-for-flow": bad(
        "solver",
        "DDPM",
        *gs.solvers.names(flow=True),
        solver=gs.solvers.DDPM("fixed_large"),
        sigmas=TIMES,
        prediction="flow",
    ),
    # the denoiser before it is called
    "denoiser-number": bad("denoiser", "callable", "int", denoiser=3, error=TypeError),
    "denoiser-none": bad("denoiser", "callable", "NoneType", denoiser=None, error=TypeError),
    **{
        f"prediction-of-{type(model).__name__}": bad(
            "prediction", type(model).__name__, "'v'", denoiser=model, prediction="v"
        )
        for model in (
            gs.EDM(tanh),
            gs.VP(tanh, levels([0.9, 0.5, 0.1])),
            gs.Flow(tanh),
            gs.Guided(gs.EDM(tanh), 2.0, {}),
        )
    },
    # what it returns
    "output-shape": bad(
        "denoiser", "step 0", "[2, 3]", "[2, 2]", denoiser=lambda x, s: x[:, :2], calls=1
    ),
    "output-broadcastable": bad(
        "denoiser", "[2, 3]", "[1, 3]", denoiser=lambda x, s: x[:1], calls=1
    ),
    "output-flat": bad("denoiser", "[2, 3]", "[6]", denoiser=lambda x, s: x.flatten(), calls=1),
    "output-int": bad(
        "denoiser", "step 0", "floating", "int64", denoiser=lambda x, s: x.long(), calls=1
    ),
    "output-tuple": bad(
        "denoiser", "step 0", "Tensor", "tuple", denoiser=lambda x, s: (x, x),
        error=TypeError, calls=1,
    ),
    "output-none": bad(
        "denoiser", "Tensor", "NoneType", denoiser=lambda x, s: None, error=TypeError, calls=1
    ),
    "output-elsewhere": bad(
        "denoiser", "step 0", "cpu", "meta", denoiser=lambda x, s: x.to("meta"), calls=1
    ),
    "output-shape-later": bad(
        "denoiser",
        "step 2",
        "[2, 3]",
        "[3, 2]",
        denoiser=lambda x, s: x if s[0] > 1 else x.T,
        calls=3,
    ),
    "output-shape-under-guidance": bad(
        "denoiser",
        "[2, 3]",
        "[1, 3]",
        denoiser=lambda x, s, n: x[:n],
        wrap=lambda f: gs.Guided(f, 2.0, {"n": 1}),
        cond={"n": 2},
        calls=2,
    ),
    # noise
    "noise-name": bad("noise", "gradsampler.noise", "str", noise="off", error=TypeError),
    "noise-class": bad("noise", noise=gs.noise.Off, error=TypeError),
    "noise-tensor": bad("noise", "Tensor", noise=GIVEN3[0], error=TypeError),
    "given-too-few": bad("Given", "3", "got 2", noise=given((2, 3), (2, 3)), **ANCESTRAL),
    "given-too-many": bad("Given", "3", "got 4", noise=given(*[(2, 3)] * 4), **ANCESTRAL),
    "given-none-needed": bad("Given", "0", "got 1", noise=given((2, 3))),
    "given-too-few-under-a-mixture": bad(
        "Given", "3", "got 1", noise=gs.noise.Mixture(given((2, 3)), 0.5), **ANCESTRAL
    ),
    "given-shape": bad(
        "Given", "tensors[1]", "[2, 3]", "[3]", noise=given((2, 3), (3,), (2, 3)), **ANCESTRAL
    ),
    "given-elsewhere": bad(
        "Given",
        "tensors[2]",
        "cpu",
        "meta",
        noise=gs.noise.Given([*GIVEN3[:2], meta(2, 3)]),
        **ANCESTRAL,
    ),
    "roll-of-one-element": bad(
        "SignedRoll", "at least 2", "got 1", z0=normal(2, 1), noise=gs.noise.SignedRoll(),
        **ANCESTRAL,
    ),
    "default-noise-of-one-element": bad(
        "SignedRoll", "at least 2", "got 1", z0=normal(2, 1), churn=gs.Churn(1.0)
    ),
    "roll-of-one-element-under-a-mixture": bad(
        "SignedRoll",
        "at least 2",
        "got 1",
        z0=normal(5, 1, 1),
        noise=gs.noise.Mixture(gs.noise.SignedRoll(), 0.5),
        **ANCESTRAL,
    ),
    # the rest
    "cond-list": bad("cond", "dict", "list", cond=[1], error=TypeError),
    "cond-tensor": bad("cond", "dict", "Tensor", cond=normal(3), error=TypeError),
    "cond-keys": bad("cond", "int", cond={1: 2}, error=(ValueError, TypeError)),
    "state_dtype-int": bad("state_dtype", "floating", "int32", state_dtype=torch.int32),
    "state_dtype-complex": bad("state_dtype", "floating", "complex64", state_dtype=torch.complex64),
    "state_dtype-name": bad(
        "state_dtype", "str", state_dtype="float32", error=(ValueError, TypeError)
    ),
    "callback-number": bad("callback", "callable", "int", callback=3, error=TypeError),
}  # fmt: skip


def run(options, calls, z0):
    """`sample` with good arguments but for ``options``; appends to ``calls`` at each model call."""
    options = {"denoiser": tanh, "sigmas": SIGMAS, "z0": z0} | options
    inner, wrap = options.pop("denoiser"), options.pop("wrap", lambda f: f)
    if not callable(inner) or isinstance(inner, gs.parameterization.Parameterization):
        return gs.sample(inner, **options)

    def denoiser(x, sigma, **cond):
        calls.append(sigma)
        return inner(x, sigma, **cond)

    return gs.sample(wrap(denoiser), **options)


@pytest.mark.filterwarnings("ignore:noise=Given is inert")
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("name", CASES)
def test_sample(name, memory):
    case, calls = CASES[name], []
    z0 = case.options.get("z0", normal(2, 3))
    if isinstance(z0, torch.Tensor):
        z0 = z0.clone()
        if z0.dtype.is_floating_point:
            z0.requires_grad_()
            z0.grad = torch.full_like(z0, 0.5)
        before, version = z0.detach().clone(), z0._version
    state = torch.get_rng_state()
    with pytest.raises(case.error) as caught:
        run({"memory": memory} | case.options | {"z0": z0}, calls, z0)
    message = str(caught.value)
    for word in case.words:
        assert word in message, f"{word!r} is missing in: {message}"
    assert re.search(r"\bgot\b", message), message
    assert len(calls) == case.calls
    if isinstance(z0, torch.Tensor):
        assert torch.equal(z0, before)
        assert z0._version == version
        assert z0.requires_grad == z0.dtype.is_floating_point
        assert z0.grad is None or bool((z0.grad == 0.5).all())
        assert z0.grad is not None or not z0.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_the_good_arguments_are_good():
    assert run({}, [], normal(2, 3)).shape == (2, 3)
    assert run(ANCESTRAL | {"noise": gs.noise.Given(GIVEN3)}, [], normal(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_the_denoiser_s_own_error_passes(memory):
    z0 = normal(2, 3).requires_grad_()

    def denoiser(x, sigma):
        raise LookupError("weights")

    with pytest.raises(LookupError, match="weights"):
        gs.sample(denoiser, z0, SIGMAS, memory=memory)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_the_denoiser_is_checked_in_the_replay_too(memory):
    z0, calls = normal(2, 3).requires_grad_(), []

    def denoiser(x, sigma):
        calls.append(None)
        return torch.tanh(x) if len(calls) <= 3 else torch.tanh(x)[:1]

    x = gs.sample(denoiser, z0, SIGMAS, memory=memory)
    if memory == "store":
        x.sum().backward()
    else:
        with pytest.raises(ValueError, match=r"denoiser.*step 2.*\[2, 3\], got \[1, 3\]"):
            x.sum().backward()
        assert z0.grad is None


# Objects that are checked when they are made.

Maker = tuple[object, tuple[str, ...], type[Exception]]
OBJECTS: dict[str, Maker] = {
    "churn-negative": (lambda: gs.Churn(-1.0), ("s_churn", "at least 0", "-1"), ValueError),
    "churn-nan": (lambda: gs.Churn(NAN), ("s_churn", "nan"), ValueError),
    "churn-inf": (lambda: gs.Churn(INF), ("s_churn", "inf"), ValueError),
    "churn-word": (lambda: gs.Churn("40"), ("s_churn", "str"), TypeError),
    "churn-bool": (lambda: gs.Churn(True), ("s_churn", "bool"), TypeError),
    "churn-tmin": (lambda: gs.Churn(1.0, s_tmin=-1), ("s_tmin", "-1"), ValueError),
    "churn-window": (
        lambda: gs.Churn(1.0, s_tmin=2.0, s_tmax=1.0),
        ("s_tmax", "s_tmin = 2.0", "1.0"),
        ValueError,
    ),
    "churn-tmax-nan": (lambda: gs.Churn(1.0, s_tmax=NAN), ("s_tmax", "nan"), ValueError),
    "churn-tmax-word": (lambda: gs.Churn(1.0, s_tmax="2"), ("s_tmax", "str"), TypeError),
    "churn-s_noise": (lambda: gs.Churn(1.0, s_noise=-1.0), ("s_noise", "-1"), ValueError),
    "sincos-nan": (lambda: gs.noise.SinCos(sin_amp=NAN), ("SinCos", "sin_amp", "nan"), ValueError),
    "sincos-word": (lambda: gs.noise.SinCos("1"), ("SinCos", "scale_gain", "str"), TypeError),
    "roll-seed-negative": (lambda: gs.noise.SignedRoll(-1), ("SignedRoll", "seed"), ValueError),
    "roll-seed-float": (lambda: gs.noise.SignedRoll(1.5), ("seed", "int", "float"), TypeError),
    "philox-seed-large": (lambda: gs.noise.Philox(2**64), ("Philox", "2**64"), ValueError),
    "mixture-other": (lambda: gs.noise.Mixture(3, 0.5), ("Mixture", "other", "int"), TypeError),
    "mixture-angle": (
        lambda: gs.noise.Mixture(gs.noise.Off(), NAN), ("Mixture", "angle", "nan"), ValueError
    ),
    "given-tensor": (
        lambda: gs.noise.Given(normal(2, 3)), ("Given", "list", "Tensor"), TypeError
    ),
    "given-numbers": (lambda: gs.noise.Given([1.0]), ("Given", "tensors[0]", "float"), TypeError),
    "given-ints": (
        lambda: gs.noise.Given([torch.ones(2, 3, dtype=torch.int32)]),
        ("Given", "tensors[0]", "floating", "int32"),
        ValueError,
    ),
    "edm-sigma_data-0": (lambda: gs.EDM(tanh, 0.0), ("EDM", "sigma_data", "0"), ValueError),
    "edm-sigma_data-word": (lambda: gs.EDM(tanh, "a"), ("sigma_data", "str"), TypeError),
    "edm-network": (lambda: gs.EDM(3), ("EDM", "network", "callable", "int"), TypeError),
    "vp-network": (
        lambda: gs.VP(3, levels([0.9, 0.1])), ("VP", "network", "callable", "int"), TypeError
    ),
    "vp-increasing": (
        lambda: gs.VP(tanh, levels([0.1, 0.9])), ("VP", "alphas_cumprod", "decrease"), ValueError
    ),
    "vp-outside": (
        lambda: gs.VP(tanh, levels([1.0, 0.9])), ("VP", "alphas_cumprod", "(0, 1)"), ValueError
    ),
    "vp-one": (
        lambda: gs.VP(tanh, levels([0.9])), ("VP", "alphas_cumprod", "[T]", "[1]"), ValueError
    ),
    "vp-prediction": (
        lambda: gs.VP(tanh, levels([0.9, 0.1]), "flow"),
        ("VP", "prediction", "'flow'", "epsilon", "v", "x0"),
        ValueError,
    ),
    "flow-network": (lambda: gs.Flow(3), ("Flow", "network", "callable", "int"), TypeError),
    "guided-denoiser": (lambda: gs.Guided(3, 2.0, {}), ("denoiser", "callable", "int"), TypeError),
    "guided-scale-shape": (
        lambda: gs.Guided(tanh, normal(2, 3), {}), ("Guided", "scale", "[N]", "[2, 3]"), ValueError
    ),
    "guided-scale-nan": (lambda: gs.Guided(tanh, NAN, {}), ("Guided", "scale", "nan"), ValueError),
    "guided-unconditional": (
        lambda: gs.Guided(tanh, 2.0, 3), ("Guided", "unconditional", "dict", "int"), TypeError
    ),
    "guided-unconditional-missing": (
        lambda: gs.Guided(tanh, 2.0, None), ("Guided", "unconditional", "NoneType"), TypeError
    ),
    "ddpm-variance": (
        lambda: gs.solvers.DDPM(variance="fixed_smal"),
        ("variance", "'fixed_smal'", "did you mean 'fixed_small'", "fixed_large"),
        ValueError,
    ),
    "dpmpp_2m_sde-variant": (
        lambda: gs.solvers.DPMpp2MSDE(variant="euler"),
        ("variant", "'euler'", "heun", "midpoint"),
        ValueError,
    ),
    "register-twice": (
        lambda: gs.solvers.register("euler", gs.solvers.Heun), ("name", "'euler'"), ValueError
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_checked_when_they_are_made(name):
    make, words, error = OBJECTS[name]
    with pytest.raises(error) as caught:
        make()
    message = str(caught.value)
    for word in (*words, "got"):
        assert word in message, f"{word!r} is missing in: {message}"


def test_given_outside_its_positions():
    noise = gs.noise.Given([normal(2, 3)])
    with pytest.raises(ValueError, match=r"Given: step must be one of \[0\], got 1"):
        noise.at(normal(2, 3), 1, 2)
