# SPDX-License-Identifier: Apache-2.0
"""What `sample` does beside its numbers: callback, bar, noise, warnings, checks, repeatability."""

import math
import warnings
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
import torch

import gradsampler as gs
from support.networks import Net
from support.problems import normal
from support.runs import LEVELS, SOLVERS, injecting, leaf, levels
from support.strategies import MEMORIES, memories
from support.tiers import few

SIGMAS = levels(LEVELS)
STEPS = len(LEVELS) - 1
EXACT = {"rtol": 1e-13, "atol": 1e-13}  # float64 rounding of a few steps


def euler_trace(denoiser, z0, sigmas, *, gamma=0.0, noises=None):
    """Euler's method with churn by hand; (level, state, prediction) of each step, and the end."""
    x, trace = sigmas[0] * z0, []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        hat = s * (1 + gamma)
        if gamma:
            x = x + torch.sqrt(hat**2 - s**2) * noises[i]
        denoised = denoiser(x, hat.expand(len(x)))
        trace.append((hat.item(), x, denoised))
        x = x + (t - hat) * (x - denoised) / hat
    return trace, x


# Callback.


@memories
@pytest.mark.parametrize("churned", [False, True], ids=["plain", "churn"])
def test_callback_sees_each_step(churned, memory):
    z0, net, infos = leaf(normal(2, 3)), Net(), []
    noises = [normal(2, 3, seed=k) for k in range(STEPS)]
    gamma = 0.9 / STEPS if churned else 0.0
    trace, end = euler_trace(net, z0, SIGMAS, gamma=gamma, noises=noises)
    options = {"churn": gs.Churn(0.9), "noise": gs.noise.Given(noises)} if churned else {}
    x = gs.sample(net, z0, SIGMAS, callback=infos.append, memory=memory, **options)
    torch.testing.assert_close(x, end, **EXACT)
    assert [info.step for info in infos] == list(range(STEPS))
    for info, (sigma, state, denoised) in zip(infos, trace, strict=True):
        assert isinstance(info, gs.StepInfo)
        assert info.num_steps == STEPS
        assert isinstance(info.sigma, float)
        assert info.sigma == pytest.approx(sigma, rel=1e-14)
        torch.testing.assert_close(info.x, state.detach(), **EXACT)
        torch.testing.assert_close(info.denoised, denoised.detach(), **EXACT)
        assert not info.x.requires_grad
        assert not info.denoised.requires_grad


@memories
@pytest.mark.parametrize("solver", SOLVERS)
def test_callback_is_called_once_a_step_with_the_step_s_first_evaluation(solver, memory):
    infos, calls = [], []

    def denoiser(x, sigma):
        calls.append((sigma[0].item(), x.detach().clone(), torch.tanh(x).detach()))
        return torch.tanh(x)

    options = injecting(solver) | {"solver": solver, "memory": memory, "final_denoise": True}
    gs.sample(denoiser, leaf(normal(2, 3)), SIGMAS, callback=infos.append, **options)
    assert [info.step for info in infos] == list(range(STEPS))
    assert [info.sigma for info in infos] == sorted((i.sigma for i in infos), reverse=True)
    for info in infos:
        assert any(
            sigma == info.sigma and torch.equal(x, info.x) and torch.equal(d, info.denoised)
            for sigma, x, d in calls
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_callback_gets_the_clean_sample_whatever_is_predicted(prediction):
    z0, infos = normal(2, 3), []

    def clean(x, sigma):
        return x / (1 + 4 * sigma.view(-1, 1) ** 2)

    def raw(x, sigma):
        s = sigma.view(-1, 1)
        if prediction == "epsilon":
            return (x - clean(x, sigma)) / s
        return (x / (s**2 + 1) - clean(x, sigma)) * torch.sqrt(s**2 + 1) / s

    trace, end = euler_trace(clean, z0, SIGMAS)
    x = gs.sample(raw, z0, SIGMAS, prediction=prediction, callback=infos.append)
    torch.testing.assert_close(x, end, **EXACT)
    for info, (_, state, denoised) in zip(infos, trace, strict=True):
        torch.testing.assert_close(info.x, state, **EXACT)
        torch.testing.assert_close(info.denoised, denoised, **EXACT)


def test_callback_under_guidance_gets_the_guided_sample():
    z0, infos = normal(2, 3), []

    def denoiser(x, sigma, gain):
        return torch.tanh(gain * x)

    def guided(x, sigma):
        return 2.5 * denoiser(x, sigma, 0.9) - 1.5 * denoiser(x, sigma, 0.1)

    trace, end = euler_trace(guided, z0, SIGMAS)
    model = gs.Guided(denoiser, 2.5, {"gain": 0.1})
    x = gs.sample(model, z0, SIGMAS, cond={"gain": 0.9}, callback=infos.append)
    torch.testing.assert_close(x, end, **EXACT)
    for info, (_, _, denoised) in zip(infos, trace, strict=True):
        torch.testing.assert_close(info.denoised, denoised, **EXACT)


@memories
def test_callback_comes_before_the_next_step_begins(memory):
    # So that it can stop a run without paying for one more call.
    events = []

    def denoiser(x, sigma):
        events.append("call")
        return torch.tanh(x)

    gs.sample(
        denoiser,
        leaf(normal(2, 3)),
        SIGMAS,
        callback=lambda info: events.append(info.step),
        memory=memory,
    )
    assert events == ["call", 0, "call", 1, "call", 2]


@memories
def test_exception_in_the_callback_passes(memory):
    def stop(info):
        if info.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.sample(Net(), leaf(normal(2, 3)), SIGMAS, callback=stop, memory=memory, progress=True)


@memories
def test_callback_is_not_called_in_backward(memory):
    z0, infos = leaf(normal(2, 3)), []
    gs.sample(Net(), z0, SIGMAS, callback=infos.append, memory=memory).sum().backward()
    assert len(infos) == STEPS


# Progress bar.


@memories
@pytest.mark.parametrize("solver", ["heun", "euler_ancestral", "res_2mid"])
def test_progress_goes_to_stderr(solver, memory, capsys):
    z0 = leaf(normal(2, 3))
    options = {"solver": solver, "memory": memory, "final_denoise": True}
    gs.sample(Net(), z0, SIGMAS, progress=True, **options).sum().backward()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{STEPS}/{STEPS}" in captured.err


def test_no_bar_unless_asked_for(capsys):
    gs.sample(Net(), leaf(normal(2, 3)), SIGMAS).sum().backward()
    assert capsys.readouterr() == ("", "")


# Noise.


@memories
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_noise_means_signed_roll_where_noise_is_injected(solver, memory):
    z0, options = normal(2, 4), {"solver": solver, "memory": memory} | injecting(solver)
    default = gs.sample(torch_tanh, z0, SIGMAS, **options)
    assert torch.equal(
        default, gs.sample(torch_tanh, z0, SIGMAS, noise=gs.noise.SignedRoll(seed=0), **options)
    )
    for other in (gs.noise.SignedRoll(seed=1), gs.noise.Off(), gs.noise.Philox(seed=0)):
        assert not torch.allclose(
            default, gs.sample(torch_tanh, z0, SIGMAS, noise=other, **options)
        )


def torch_tanh(x, sigma):
    return torch.tanh(x)


@pytest.mark.parametrize(
    "solver", [name for name in SOLVERS if not gs.solvers.resolve(name).stochastic]
)
def test_no_noise_injects_nothing_in_a_deterministic_run(solver):
    z0 = normal(2, 4)
    assert torch.equal(
        gs.sample(torch_tanh, z0, SIGMAS, solver=solver),
        gs.sample(torch_tanh, z0, SIGMAS, solver=solver, noise=gs.noise.Off()),
    )
    # One-element states, which no roll could serve, are fine without noise.
    assert gs.sample(torch_tanh, normal(2, 1), SIGMAS, solver=solver).shape == (2, 1)


def test_off_silences_an_ancestral_solver():
    z0 = normal(2, 3)
    x = SIGMAS[0] * z0
    for s, t in pairwise(SIGMAS):
        down = torch.sqrt(t**2 - (t / s) ** 2 * (s**2 - t**2))
        x = x + (down - s) * (x - torch.tanh(x)) / s
    got = gs.sample(torch_tanh, z0, SIGMAS, solver="euler_ancestral", noise=gs.noise.Off())
    torch.testing.assert_close(got, x, **EXACT)


def test_off_silences_churn_but_keeps_its_levels():
    z0, seen = normal(2, 3), []

    def denoiser(x, sigma):
        seen.append(sigma[0].item())
        return torch.tanh(x)

    _, end = euler_trace(torch_tanh, z0, SIGMAS, gamma=0.2, noises=[torch.zeros(2, 3)] * STEPS)
    churn = gs.Churn(0.2 * STEPS)
    got = gs.sample(denoiser, z0, SIGMAS, churn=churn, noise=gs.noise.Off())
    torch.testing.assert_close(got, end, **EXACT)
    assert seen == pytest.approx([1.2 * s for s in LEVELS[:-1]])


INERT = {
    "deterministic": {},
    "churn-outside-its-window": {"churn": gs.Churn(1.0, s_tmin=100.0)},
    "no-churn": {"churn": gs.Churn(0.0)},
    "ddim": {"solver": "ddim"},
    "eta-0": {"solver": "euler_ancestral", "eta": 0.0},
}


@pytest.mark.parametrize("case", INERT)
def test_inert_noise_warns_where_the_caller_is(case):
    z0 = normal(2, 3)
    with pytest.warns(UserWarning, match=r"noise=SignedRoll.*inert.*churn.*eta") as caught:
        x = gs.sample(torch_tanh, z0, SIGMAS, noise=gs.noise.SignedRoll(), **INERT[case])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    # The suite turns warnings into errors, so this says that None and Off are silent.
    assert torch.equal(x, gs.sample(torch_tanh, z0, SIGMAS, **INERT[case]))
    assert torch.equal(x, gs.sample(torch_tanh, z0, SIGMAS, noise=gs.noise.Off(), **INERT[case]))


# Detached denoisers.


def without_grad(x, sigma):
    with torch.no_grad():
        return torch.tanh(x)


def in_inference_mode(x, sigma):
    with torch.inference_mode():
        y = torch.tanh(x)
    return y.clone()


def through_numpy(x, sigma):
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def detaching(x, sigma):
    return torch.tanh(x).detach()


@memories
@pytest.mark.parametrize("denoiser", [without_grad, in_inference_mode, through_numpy, detaching])
def test_detached_denoiser_warns_once(denoiser, memory):
    z0 = leaf(normal(2, 3))
    with pytest.warns(gs.GradientWarning, match="denoiser.*step 0.*no_grad") as caught:
        x = gs.sample(denoiser, z0, SIGMAS, memory=memory)
    assert len(caught) == 1
    (g,) = torch.autograd.grad(x.sum(), z0)  # that of the linear part of the run
    torch.testing.assert_close(g, torch.full_like(g, LEVELS[-1]), **EXACT)


@memories
@pytest.mark.parametrize("step", range(STEPS))
def test_warning_names_the_step_that_detaches(step, memory):
    def denoiser(x, sigma):
        return torch.tanh(x.detach() if sigma[0] == SIGMAS[step] else x)

    with pytest.warns(gs.GradientWarning, match=f"step {step}"):
        gs.sample(denoiser, leaf(normal(2, 3)), SIGMAS, memory=memory)


@memories
def test_warning_of_a_denoiser_with_parameters_that_detaches_its_input(memory):
    net = Net()
    with pytest.warns(gs.GradientWarning, match="step 0"):
        gs.sample(lambda x, s: net(x.detach(), s), leaf(normal(2, 3)), SIGMAS, memory=memory)


@memories
def test_no_warning_of_a_detached_denoiser_without_grad_mode(memory):
    with torch.no_grad():
        gs.sample(detaching, leaf(normal(2, 3)), SIGMAS, memory=memory)


def test_gradient_warning_is_a_user_warning():
    assert issubclass(gs.GradientWarning, UserWarning)


# Inputs.


@memories
def test_nested_cond(memory):
    z0, a, b, c = leaf(normal(2, 3)), *(leaf(normal(3, seed=k)) for k in range(3))
    cond = OrderedDict(a=a, more={"b": [b, "text", (c, None)]}, flag=True)
    seen = []

    def denoiser(x, sigma, a, more, flag):
        b, text, (c, none) = more["b"]
        seen.append((type(more), type(more["b"]), type(more["b"][2]), text, none, flag))
        return torch.tanh(a * x + b) * c

    x = gs.sample(denoiser, z0, SIGMAS, cond=cond, memory=memory)
    _, end = euler_trace(lambda x, s: torch.tanh(a * x + b) * c, z0, SIGMAS)
    torch.testing.assert_close(x, end, **EXACT)
    inputs = [z0, a, b, c]
    wanted = torch.autograd.grad(end.sum(), inputs)
    for g, w in zip(torch.autograd.grad(x.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(g, w, **EXACT)
    assert set(seen) == {(dict, list, tuple, "text", None, True)}
    assert cond["a"] is a
    assert cond["more"]["b"][2][0] is c


@pytest.mark.parametrize(
    "form",
    [list, tuple, lambda v: torch.tensor(v, dtype=torch.float64), np.array],
    ids=["list", "tuple", "float64", "numpy"],
)
def test_levels_in_every_form(form):
    # Python floats are float64 numbers: nothing may round them to float32.
    values = [7.3, 1.1, 0.1]
    expected = values[0] * 0.25
    for s, t in [(7.3, 1.1), (1.1, 0.1)]:
        expected = expected + (t - s) * (expected - math.tanh(expected)) / s
    z0 = torch.full((1, 2), 0.25, dtype=torch.float64)
    got = gs.sample(torch_tanh, z0, form(values))
    assert got.tolist()[0] == pytest.approx([expected] * 2, rel=1e-14)


def test_levels_in_float32_are_taken_as_they_are():
    single = torch.tensor([7.3, 1.1, 0.1])
    z0 = normal(2, 3)
    expected = gs.sample(torch_tanh, z0, single.double())
    assert torch.equal(gs.sample(torch_tanh, z0, single), expected)


def test_whole_numbers_are_levels():
    z0 = normal(2, 3)
    assert torch.equal(
        gs.sample(torch_tanh, z0, [3, 2, 1]), gs.sample(torch_tanh, z0, [3.0, 2.0, 1.0])
    )


@memories
def test_levels_receive_a_gradient_of_their_own_dtype(memory):
    sigmas = leaf(SIGMAS.float())
    gs.sample(Net(), normal(2, 3), sigmas, memory=memory).sum().backward()
    double = leaf(sigmas.double())
    gs.sample(Net(), normal(2, 3), double, memory=memory).sum().backward()
    assert sigmas.grad.dtype == torch.float32
    torch.testing.assert_close(sigmas.grad, double.grad.float())


STRIDED = {
    "transposed": lambda: normal(3, 2).T,
    "sliced": lambda: normal(4, 6)[::2, ::2],
    "expanded": lambda: normal(1, 3).expand(2, 3),
    "channels-last": lambda: normal(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "permuted": lambda: normal(4, 3, 2).permute(2, 0, 1),
    "flipped": lambda: normal(2, 3).flip(1),
}


@memories
@pytest.mark.parametrize("noise", [gs.noise.SignedRoll(), gs.noise.Philox(), gs.noise.SinCos()])
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_initial_noise(layout, noise, memory):
    z0 = STRIDED[layout]().requires_grad_()
    plain = leaf(z0.contiguous())
    options = {"solver": "euler_ancestral", "noise": noise, "memory": memory}
    x = gs.sample(torch_tanh, z0, SIGMAS, **options)
    expected = gs.sample(torch_tanh, plain, SIGMAS, **options)
    assert torch.equal(x, expected)
    (g,) = torch.autograd.grad(x.sin().sum(), z0)
    (w,) = torch.autograd.grad(expected.sin().sum(), plain)
    torch.testing.assert_close(g, w, **EXACT)


@memories
def test_strided_output_of_the_denoiser(memory):
    z0 = leaf(normal(3, 3))
    _, expected = euler_trace(lambda x, s: torch.tanh(x.T).T, z0, SIGMAS)
    x = gs.sample(lambda x, s: torch.tanh(x.T).T, z0, SIGMAS, memory=memory)
    torch.testing.assert_close(x, expected, **EXACT)
    constant = leaf(normal(1, 1))
    y = gs.sample(lambda x, s: constant.expand(3, 3) + 0 * x, z0, SIGMAS, memory=memory)
    (g,) = torch.autograd.grad(y.sum(), constant)
    assert g.item() == pytest.approx(9 * (1 - LEVELS[-1] / LEVELS[0]))


@memories
def test_inputs_stay_as_they_are(memory):
    z0, sigmas, shift, noises = normal(2, 3), SIGMAS.clone(), normal(3), [normal(2, 3)] * STEPS
    tensors = [z0, sigmas, shift, *noises]
    before = [x.clone() for x in tensors]
    z0.requires_grad_()
    x = gs.sample(
        Net(),
        z0,
        sigmas,
        solver="euler_ancestral",
        noise=gs.noise.Given(noises),
        cond={"shift": shift},
        memory=memory,
    )
    x.sum().backward()
    assert all(map(torch.equal, tensors, before))
    assert [x.requires_grad for x in tensors] == [True] + [False] * (len(tensors) - 1)


@memories
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_denoiser_that_writes_into_its_input(mode, memory):
    # As networks with in-place activations do: the run's state would change with it.
    z0 = leaf(normal(2, 3))
    with mode(), pytest.raises((RuntimeError, ValueError), match=r"in-place|change in place"):
        gs.sample(lambda x, s: x.mul_(2).tanh(), z0, SIGMAS, memory=memory)


# Repeatability.


@memories
@pytest.mark.parametrize("noise", [gs.noise.SignedRoll(seed=3), gs.noise.Philox(seed=3)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_call_gives_the_same_bits(solver, noise, memory):
    net, before = Net(), torch.get_rng_state()

    def run():
        z0 = leaf(normal(2, 3))
        x = gs.sample(net, z0, SIGMAS, solver=solver, noise=noise, memory=memory, **options)
        return x.detach(), *torch.autograd.grad(x.sum(), [z0, net.weight])

    options = injecting(solver)
    first = run()
    torch.rand(7)
    assert all(map(torch.equal, first, run()))
    torch.set_rng_state(before)


@memories
def test_global_random_state_is_left_alone(memory):
    before = torch.get_rng_state()
    for noise in (gs.noise.SignedRoll(), gs.noise.Philox(), gs.noise.Mixture(gs.noise.Off(), 0.3)):
        z0 = leaf(normal(2, 3))
        options = {"solver": "dpmpp_2m_sde", "noise": noise, "memory": memory}
        gs.sample(Net(), z0, SIGMAS, **options).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("memory", few(MEMORIES, "checkpoint"))
def test_thousand_steps(memory):
    z0, net = leaf(normal(2, 3, dtype=torch.float32)), Net(dtype=torch.float32)
    sigmas = leaf(gs.schedules.karras(1000, final="zero"))
    calls = []

    def denoiser(x, sigma):
        calls.append(None)
        return net(x, sigma)

    options = {"solver": "euler_ancestral", "memory": memory}
    x = gs.sample(denoiser, z0, sigmas, **options)
    assert len(calls) == 1000
    x.sum().backward()
    for tensor in (x, z0.grad, sigmas.grad, net.weight.grad):
        assert tensor.isfinite().all()
    assert z0.grad.abs().min() > 0


# Finite values.


def poisoned_at(step, value=math.nan):
    """A denoiser whose output has one bad element at one step."""

    def denoiser(x, sigma):
        y = torch.tanh(x)
        if sigma[0] == SIGMAS[step]:
            mask = torch.zeros_like(y)
            mask[0, 1] = value
            y = y + mask
        return y

    return denoiser


@memories
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", range(STEPS))
def test_bad_prediction_names_step_and_level(step, value, memory):
    z0, calls = leaf(normal(2, 3)), []
    poisoned = poisoned_at(step, value)

    def denoiser(x, sigma):
        calls.append(None)
        return poisoned(x, sigma)

    with pytest.raises(gs.NonFiniteError) as caught:
        gs.sample(denoiser, z0, SIGMAS, memory=memory, check_finite=True)
    message = str(caught.value)
    assert f"step {step}" in message
    assert f"{LEVELS[step]:g}" in message
    assert "output" in message
    assert len(calls) == step + 1
    assert z0.grad is None


@memories
def test_bad_initial_noise_is_found_before_the_model_is_called_on_it(memory):
    z0 = normal(2, 3)
    z0[1, 2] = math.nan
    with pytest.raises(gs.NonFiniteError, match=r"state.*step 0.*sigma = 3"):
        gs.sample(torch_tanh, leaf(z0), SIGMAS, memory=memory, check_finite=True)


@memories
@pytest.mark.parametrize("step", range(STEPS))
def test_bad_gradient_names_step_and_level(step, memory):
    z0 = leaf(normal(2, 3))

    def denoiser(x, sigma):
        y = torch.tanh(x)
        if sigma[0] == SIGMAS[step]:
            y = y + torch.sqrt(0 * x)  # 0, with slope infinity times 0
        return y

    x = gs.sample(denoiser, z0, SIGMAS, memory=memory, check_finite=True)
    assert x.isfinite().all()
    with pytest.raises(gs.NonFiniteError) as caught:
        x.sum().backward()
    message = str(caught.value)
    assert "gradient" in message
    assert f"step {step}" in message
    assert f"{LEVELS[step]:g}" in message
    assert z0.grad is None


@memories
def test_bad_loss_is_found_in_backward(memory):
    z0 = leaf(normal(2, 3))
    x = gs.sample(torch_tanh, z0, SIGMAS, memory=memory, check_finite=True)
    with pytest.raises(gs.NonFiniteError, match="gradient"):
        (x * math.inf).sum().backward()
    assert z0.grad is None


@memories
def test_without_the_check_bad_values_pass(memory):
    z0 = leaf(normal(2, 3))
    x = gs.sample(poisoned_at(1), z0, SIGMAS, memory=memory)
    assert x[0, 1].isnan()
    assert x[1].isfinite().all()
    (x * math.nan).sum().backward()
    assert z0.grad.isnan().all()


@memories
def test_the_check_changes_no_numbers(memory):
    z0 = leaf(normal(2, 3))
    results = []
    for check_finite in (False, True):
        x = gs.sample(Net(), z0, SIGMAS, solver="heun", memory=memory, check_finite=check_finite)
        results.append((x.detach(), *torch.autograd.grad(x.sum(), z0)))
    assert all(map(torch.equal, *results))


def test_non_finite_error_is_an_arithmetic_error():
    assert issubclass(gs.NonFiniteError, ArithmeticError)


@memories
def test_nothing_is_warned_of_in_an_ordinary_run(memory):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for solver in SOLVERS:
            z0 = leaf(normal(2, 3))
            gs.sample(Net(), z0, SIGMAS, solver=solver, memory=memory).sum().backward()
    assert caught == []


def test_conditioning_without_tensors_arrives_as_it_is():
    seen = []

    def denoiser(x, sigma, **cond):
        seen.append(cond)
        return 0.5 * x

    given = {"names": {}, "scales": [], "flag": None}
    gs.sample(denoiser, torch.ones(1, 2), gs.schedules.karras(2), cond=given)
    assert seen == [given, given]
