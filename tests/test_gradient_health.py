# SPDX-License-Identifier: Apache-2.0
"""What a monitor sees of a gradient: against loops in plain torch, without a call of its own."""

import math
from itertools import pairwise

import pytest
import torch

import gradsampler as gs
from gradsampler import policies
from gradsampler.gradient_health import draw
from support.networks import Net
from support.problems import normal
from support.runs import leaf, levels

LEVELS = levels([3.0, 1.6, 0.9, 0.5, 0.3])
N = len(LEVELS) - 1
MEMORIES = ["store", "checkpoint", "revolve:2", "auto", "offload"]
memories = pytest.mark.parametrize("memory", MEMORIES)
SHIFT = 0.3 * normal(3, seed=3)


def weighed(x):
    return (x.sin() * normal(*x.shape, seed=7)).sum()


def ancestral(denoise, z0s, noise, sigmas=LEVELS):
    """Euler ancestral; a copy of z0 for the start and for each noise. Returns x and the states."""
    x, states = sigmas[0] * z0s[0], []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = x.clone()
        states.append(x)
        up = t / s * (s**2 - t**2).sqrt()
        x = (
            x
            + ((t**2 - up**2).sqrt() - s) * (x - denoise(x, s)) / s
            + up * noise.at(z0s[i + 1], i, N)
        )
    return x, states


def norm(x):
    return x.norm().item()


WRAPPED = {
    "plain": lambda net: net,
    "edm": lambda net: gs.EDM(net),
    "guided": lambda net: gs.Guided(gs.EDM(net), 2.5, {"shift": 0.1}),
}


@memories
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_norms_shares_and_gains(wrapper, memory):
    net, noise, z0 = Net(), gs.noise.SignedRoll(2), leaf(normal(2, 3))
    model = WRAPPED[wrapper](net)

    def denoise(x, s):
        return model(x, s.expand(2), shift=SHIFT)

    monitor = gs.Monitor()
    options = {"solver": "euler_ancestral", "noise": noise, "cond": {"shift": SHIFT}}
    weighed(gs.sample(model, z0, LEVELS, memory=memory, monitor=monitor, **options)).backward()
    z0s = [leaf(z0) for _ in range(N + 1)]
    x, states = ancestral(denoise, z0s, noise)
    lams = torch.autograd.grad(weighed(x), [*states, x, *z0s], retain_graph=True)
    assert [call.step for call in monitor.calls] == list(range(N))
    torch.testing.assert_close([call.sigma for call in monitor.calls], LEVELS[:-1].tolist())
    for i, call in enumerate(monitor.calls):
        s, t = LEVELS[i], LEVELS[i + 1]
        down = (t**2 - (t / s * (s**2 - t**2).sqrt()) ** 2).sqrt()
        following = lams[i + 1]  # the cotangent of the next state, or of the sample
        w = (1 - down / s) * following  # of D
        jacobian = torch.autograd.functional.jacobian(lambda x, s=s: denoise(x, s), states[i])
        pulled = torch.einsum("bc,bcde->de", w, jacobian)
        assert call.gain == pytest.approx(norm(pulled) / norm(w), rel=1e-9)
        assert call.lam == pytest.approx(norm(lams[i]), rel=1e-9)
        skip = {"plain": 0.0}.get(wrapper, 0.25 / (s**2 + 0.25))
        around = down / s * following + skip * w
        assert call.state == pytest.approx(norm(around), rel=1e-9)
        assert call.network == pytest.approx(norm(lams[i] - around), rel=1e-9)
        assert call.noise == pytest.approx(norm(lams[N + 2 + i]), rel=1e-9)
        assert math.isnan(call.cosine)
    assert monitor.first_nonfinite is None


BESIDE = {
    "last": policies.LastSteps(2),
    "detached": policies.DetachedInput(),
    "chosen": policies.ChosenSteps([1, 2]),
    "clipped": policies.ClippedCotangent(0.2),
    "several": [policies.DetachedInput(), policies.LastSteps(3)],
}


class Counted:
    def __init__(self):
        self.network, self.count = Net(), 0

    def __call__(self, x, sigma, **cond):
        self.count += 1
        return self.network(x, sigma, **cond)


def cosine(ours, theirs):
    a, b = (torch.cat([x.flatten() for x in each]) for each in (ours, theirs))
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.filterwarnings("ignore:gradient=.*start receives no")
@pytest.mark.parametrize("memory", MEMORIES[1:])
@pytest.mark.parametrize("name", BESIDE)
def test_a_policy_beside_the_exact_gradient_without_a_call_more(name, memory):
    z0, shift, start = leaf(normal(2, 3)), leaf(SHIFT), leaf(2 * normal(2, 3, seed=5))
    options = {
        "solver": "dpmpp_2m_sde",
        "cond": {"shift": shift},
        "memory": memory,
        "start": start,
    }
    counted = Counted()
    weighed(gs.sample(counted, z0, LEVELS, **options)).backward()
    plain, counted.count = counted.count, 0
    monitor = gs.health(counted, z0, LEVELS, weighed, gradient=BESIDE[name], **options)
    assert counted.count == plain
    inputs = {"z0": [z0], "cond": [shift], "start": [start], "parameters": [*Net().parameters()]}
    inputs["parameters"] = [*counted.network.parameters()]
    names = [of for of, xs in inputs.items() for _ in xs]
    found = []
    for policy in (None, BESIDE[name]):
        x = gs.sample(counted, z0, LEVELS, gradient=policy, **options)
        leaves = [x for xs in inputs.values() for x in xs]
        got = torch.autograd.grad(weighed(x), leaves, allow_unused=True)
        found.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(got, leaves, strict=True)]
        )
    for of in inputs:
        ours, theirs = ([g for g, n in zip(each, names, strict=True) if n == of] for each in found)
        if any(g.any() for g in theirs):
            assert monitor.cosines[of] == pytest.approx(cosine(ours, theirs), abs=1e-10), of
        else:
            assert math.isnan(monitor.cosines[of]), of


@pytest.mark.parametrize("name", BESIDE)
def test_cosines_step_by_step(name):
    z0, net = leaf(normal(2, 3)), Net()
    options = {"solver": "euler_ancestral", "noise": gs.noise.SignedRoll(2), "memory": "checkpoint"}
    monitor = gs.health(net, z0, LEVELS, weighed, gradient=BESIDE[name], **options)
    alone = {}
    for key, policy in (("exact", None), ("beside", BESIDE[name])):
        seen = gs.Monitor()
        x = gs.sample(net, z0, LEVELS, gradient=policy, monitor=seen, **options)
        torch.autograd.grad(weighed(x), z0)
        alone[key] = seen.calls
    for call, exact, other in zip(monitor.calls, alone["exact"], alone["beside"], strict=True):
        assert call.lam == pytest.approx(exact.lam, rel=1e-12)
        assert call.gain == pytest.approx(exact.gain, rel=1e-12)
        assert call.sigma == other.sigma
        if math.isnan(other.lam):  # of a step before the last ones
            assert math.isnan(call.beside)
            continue
        assert call.beside == pytest.approx(other.lam, rel=1e-12)
        assert -1 <= call.cosine <= 1 + 1e-12
    if name in ("last", "clipped"):  # nothing is left out before the last step's state
        assert monitor.calls[-1].cosine == pytest.approx(1.0)


def test_the_reversible_run_is_seen_too():
    z0, net, seen = leaf(normal(2, 3)), Net(), {}
    for memory in ("reversible", "checkpoint"):
        monitor = gs.Monitor(policies.DetachedInput())
        options = {"solver": "midpoint_reversible", "memory": memory, "monitor": monitor}
        weighed(gs.sample(net, z0, LEVELS, **options)).backward()
        seen[memory] = monitor.calls
    for a, b in zip(*seen.values(), strict=True):
        assert a[2:] == pytest.approx(b[2:], rel=1e-6, nan_ok=True)


def test_levels_of_each_sample_and_a_second_backward():
    z0, net, monitor = leaf(normal(2, 3)), Net(), gs.Monitor()
    sigmas = torch.stack([LEVELS, 1.1 * LEVELS], dim=1)
    x = gs.sample(net, z0, sigmas, monitor=monitor, churn=gs.Churn(0.9), memory="checkpoint")
    weighed(x).backward(retain_graph=True)
    first = monitor.calls
    assert first[0].sigma == pytest.approx(1.1 * 3.0 * (1 + 0.9 / N))
    assert all(math.isfinite(value) for call in first for value in call[:7])
    (2 * weighed(x)).backward()
    for one, two in zip(first, monitor.calls, strict=True):
        assert two.lam == pytest.approx(2 * one.lam)
        assert two.noise == pytest.approx(2 * one.noise)
        assert two.gain == pytest.approx(one.gain)


def test_guidance_whose_branches_a_solver_uses_apart_has_no_gain():
    z0, net = leaf(normal(2, 3)), Net()
    model, cond = gs.Guided(net, 2.5, {"shift": 0.1}), {"shift": SHIFT}
    monitor = gs.health(model, z0, LEVELS, weighed, solver="euler_cfg_pp", cond=cond)
    assert all(math.isnan(call.gain) for call in monitor.calls)
    assert all(call.network > 0 for call in monitor.calls)


def broken(at, what):
    """A denoiser with a state or a gradient that is not finite at one level."""

    def denoiser(x, sigma):
        if sigma[0] != LEVELS[at]:
            return 0.5 * x
        return x / 0 if what == "state" else torch.sqrt(x * 0) + 0.5 * x

    return denoiser


@pytest.mark.parametrize(("what", "at", "step"), [("state", 1, 2), ("gradient", 2, 2)])
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_what_was_the_first_not_to_be_finite(what, at, step, memory):
    z0 = leaf(normal(2, 3))
    monitor = gs.health(broken(at, what), z0, LEVELS, lambda x: x.sum(), memory=memory)
    assert monitor.first_nonfinite == (what, step)
    assert str(monitor).endswith(f"not finite: the {what} at step {step}")


def test_a_table_and_a_picture(tmp_path):
    z0, net = leaf(normal(2, 3)), Net()
    picture, policy = tmp_path / "health.png", policies.LastSteps(2)
    options = {"solver": "heun", "churn": gs.Churn(0.9), "picture": picture}
    monitor = gs.health(net, z0, LEVELS, weighed, gradient=policy, **options)
    head, *rows, ending = str(monitor).splitlines()
    assert head.split() == [*HEAD.split(), "|lam|", "beside", "cosine"]
    assert [int(row.split()[0]) for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row.split()[-1] for row in rows] == ["-"] * 4 + [
        f"{c.cosine:.4g}" for c in monitor.calls[4:]
    ]
    assert ending == f"cosine to the gradient of the run: z0 {monitor.cosines['z0']:.4g}, " + (
        f"parameters {monitor.cosines['parameters']:.4g}"
    )
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw(gs.Monitor(), tmp_path / "empty.png")
    assert str(gs.Monitor()).split() == HEAD.split()


HEAD = "step sigma |lam| by state by network by noise gain"


def test_a_run_without_a_backward_and_one_without_a_gradient():
    monitor = gs.Monitor()
    gs.sample(Net(), normal(2, 3), LEVELS, monitor=monitor)
    assert [call.step for call in monitor.calls] == list(range(N))
    assert all(math.isnan(call.lam) for call in monitor.calls)
    with pytest.warns(gs.GradientWarning):
        monitor = gs.health(lambda x, s: x.detach(), normal(2, 3), [1.0, 0.0], weighed)
    assert math.isnan(monitor.calls[0].gain)


def test_what_does_not_fit_is_refused():
    z0, counted = leaf(normal(2, 3)), Counted()
    with pytest.raises(TypeError, match=r"monitor must be a gradsampler.Monitor or None, got str"):
        gs.sample(counted, z0, LEVELS, monitor="all")
    with pytest.raises(
        TypeError, match=r"Monitor: beside must be a policy of gradsampler.policies"
    ):
        gs.Monitor("last")
    with pytest.raises(ValueError, match=r"memory must pull a call back twice, .* got Store; take"):
        gs.health(counted, z0, LEVELS, weighed, gradient=BESIDE["last"], memory="store")
    with pytest.raises(ValueError, match="ChosenSteps: steps must lie within a run of 4 steps"):
        gs.health(counted, z0, LEVELS, weighed, gradient=policies.ChosenSteps([9]))
    with pytest.raises(TypeError, match="loss must be callable as loss"):
        gs.health(counted, z0, LEVELS, 3.0)
    assert counted.count == 0
    with pytest.raises(TypeError, match="loss: the value that it returns must be a scalar tensor"):
        gs.health(counted, z0, LEVELS, lambda x: x)
