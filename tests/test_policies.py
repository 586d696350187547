# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not those of the run: against autograd loops that detach by hand."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import gradsampler as gs
from gradsampler import policies
from gradsampler.engine.program import START, Z0, Evaluation, Stage
from gradsampler.parameterization import parameterize
from support.gradients import assert_close
from support.networks import Net
from support.noises import KINDS, injections, make_noise
from support.problems import normal
from support.runs import SOLVERS, injecting, leaf, levels
from support.tiers import few, pairs

LEVELS = levels([3.0, 1.6, 0.9, 0.5, 0.3])  # N = 4
N = len(LEVELS) - 1
MEMORIES = ["store", "checkpoint", "revolve:2", "auto", "offload"]
memories = pytest.mark.parametrize("memory", few(MEMORIES, "store", "checkpoint"))


class Rule:
    """What a loop by hand does: which calls are constant, in which input, and what hooks do."""

    def __init__(self, pulled=range(N + 1), entered=True, hook=None, first=0):
        self.pulled, self.entered, self.hook, self.first = set(pulled), entered, hook, first

    def call(self, network, x, level, step, **cond):
        output = network(x if self.entered else x.detach(), level, **cond)
        return output if step in self.pulled else output.detach()

    def begin(self, x, step):
        """The state that a step's first call sees."""
        if self.hook is not None and x.requires_grad:
            x = x.clone()
            x.register_hook(lambda lam: self.hook(step, lam))
        return x


def clipped(most):
    def hook(step, lam):
        norms = lam.flatten(1).norm(dim=1).view(-1, *[1] * (lam.ndim - 1))
        return torch.where(norms > most, lam * most / norms, lam)

    return hook


FACTORS = (0.5, 1.5, 0.9, 0.7)
POLICIES = {
    "exact": (policies.Exact(), Rule()),
    "chosen": (policies.ChosenSteps([0, -1]), Rule(pulled=[0, N - 1])),
    "detached": (policies.DetachedInput(), Rule(entered=False)),
    "no jacobian": (policies.NoJacobian(), Rule(pulled=[])),
    "scaled": (policies.ScaledCotangent(0.8), Rule(hook=lambda step, lam: 0.8 * lam)),
    "by step": (
        policies.ScaledCotangent(FACTORS),
        Rule(hook=lambda step, lam: FACTORS[step] * lam),
    ),
    "clipped": (policies.ClippedCotangent(0.3), Rule(hook=clipped(0.3))),
    "last": (policies.LastSteps(2), Rule(first=N - 2)),
    "drtune": (
        [policies.DetachedInput(), policies.ChosenSteps([1, 3])],
        Rule(pulled=[1, 3], entered=False),
    ),
    "last detached clipped": (
        [policies.ClippedCotangent(0.2), policies.LastSteps(3), policies.DetachedInput()],
        Rule(entered=False, hook=clipped(0.2), first=N - 3),
    ),
}
rules = pytest.mark.parametrize("name", POLICIES)


def assert_same(run, loop, inputs):
    """The sample and the gradients; a None is a zero."""
    x, expected = run(), loop()
    assert_close(x.detach(), expected.detach(), 1e-12)
    weights = normal(*x.shape, seed=7)
    got, wanted = (
        torch.autograd.grad((y.sin() * weights).sum(), inputs, allow_unused=True)
        for y in (x, expected)
    )
    for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
        none = torch.zeros_like(inputs[k])
        assert_close(none if g is None else g, none if w is None else w, 1e-11, f"gradient {k}")
    return wanted


ignored = pytest.mark.filterwarnings("ignore:gradient=.* is zero, since")


@ignored
@memories
@rules
def test_euler_with_churn(name, memory):
    """Algorithm 2 of EDM without its correction, with noise that is made of z0."""
    policy, rule = POLICIES[name]
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(LEVELS), leaf(normal(3, seed=3)), Net()
    noise, gamma = gs.noise.SignedRoll(seed=2), 0.9 / N

    def loop():
        x = sigmas[0] * z0
        for i, (s, t) in enumerate(pairwise(sigmas)):
            if 0 < i == rule.first:
                x = x.detach()
            x = x + s * (gamma * (2 + gamma)) ** 0.5 * noise.at(z0, i, N)
            s = s * (1 + gamma)
            x = rule.begin(x, i)
            x = x + (t - s) * (x - rule.call(net, x, s.expand(2), i, shift=shift)) / s
        return x

    def run():
        options = {"churn": gs.Churn(0.9), "cond": {"shift": shift}, "noise": noise}
        return gs.sample(net, z0, sigmas, gradient=policy, memory=memory, **options)

    wanted = assert_same(run, loop, [z0, sigmas, shift, *net.parameters()])
    assert wanted[0].any()


@ignored
@memories
@rules
def test_heun_around_a_preconditioned_network(name, memory):
    """Two calls a step; what EDM adds to the output stays, whatever is held constant."""
    policy, rule = POLICIES[name]
    z0, shift, net, sigmas = leaf(normal(2, 3)), leaf(normal(3, seed=3)), Net(), LEVELS

    def denoised(x, s, i):
        c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
        c_in, level = 1 / (s**2 + 0.25).sqrt(), (s.log() / 4).expand(2)
        return c_skip * x + c_out * rule.call(net, c_in * x, level, i, shift=shift)

    def loop():
        x = sigmas[0] * z0
        for i, (s, t) in enumerate(pairwise(sigmas)):
            x = rule.begin(x.detach() if 0 < i == rule.first else x, i)
            slope = (x - denoised(x, s, i)) / s
            ahead = x + (t - s) * slope
            x = x + (t - s) / 2 * (slope + (ahead - denoised(ahead, t, i)) / t)
        return x

    def run():
        options = {"solver": "heun", "cond": {"shift": shift}, "memory": memory}
        return gs.sample(gs.EDM(net), z0, sigmas, gradient=policy, **options)

    assert_same(run, loop, [z0, shift, *net.parameters()])


@ignored
@memories
@rules
def test_a_multistep_method(name, memory):
    """DPM-Solver++(2M), whose steps look back at an output of the step before."""
    policy, rule = POLICIES[name]
    z0, sigmas, net = leaf(normal(2, 3)), leaf(LEVELS), Net()

    def loop():
        x, old = sigmas[0] * z0, None
        for i, (s, t) in enumerate(pairwise(sigmas)):
            if 0 < i == rule.first:
                x, old = x.detach(), None if old is None else old.detach()
            x = rule.begin(x, i)
            d = mean = rule.call(net, x, s.expand(2), i)
            if old is not None:
                r = (sigmas[i - 1] / s).log() / (s / t).log()
                mean = (1 + 1 / (2 * r)) * d - old / (2 * r)
            x, old = (t / s) * x + (1 - t / s) * mean, d
        return x

    def run():
        options = {"solver": "dpmpp_2m", "memory": memory}
        return gs.sample(net, z0, sigmas, gradient=policy, **options)

    assert_same(run, loop, [z0, sigmas, *net.parameters()])


def interpreted(program, model, z0, start, noise, rule, shift):
    """A program in plain torch, which detaches and hooks as the rule says."""
    c, slots, begun = program.coefficients, {Z0: z0, START: start}, set()
    following = [*program.instructions[1:], None]
    for instruction, after in zip(program.instructions, following, strict=True):
        if isinstance(instruction, Stage):
            x = sum(c[k] * slots[slot] for slot, k in instruction.terms)
            begins = isinstance(after, Evaluation) and after.step not in begun
            if begins and 0 < rule.first <= after.step and len(begun) == rule.first:
                x = x.detach()
                slots = {slot: value.detach() for slot, value in slots.items()} | {Z0: z0}
            for step, draw, k in instruction.injections:
                added = c[k] * noise.at(z0, step, program.num_steps, draw)
                x = x + (added if step >= rule.first else added.detach())
            if begins:
                begun.add(after.step)
                x = rule.begin(x, after.step)
            slots[instruction.writes] = x
        else:
            x, level = slots[instruction.state], c[instruction.c_noise].expand(len(z0))
            scaled = c[instruction.c_in] * x
            scaled = scaled if rule.entered else scaled.detach()
            outputs = model.outputs(scaled, level, {"shift": shift})
            kept = instruction.step in rule.pulled
            outputs = outputs if kept else [output.detach() for output in outputs]
            slots.update(zip(instruction.writes, outputs, strict=True))
    return slots[program.output]


@pytest.mark.filterwarnings("ignore:gradient=")
@pairs(
    solver=SOLVERS,
    name=[name for name in POLICIES if name != "exact"],
    kind=KINDS,
    memory=MEMORIES,
)
@pytest.mark.thorough
def test_every_solver_against_an_interpreter(solver, name, kind, memory):
    policy, rule = POLICIES[name]
    z0, start, sigmas = leaf(normal(2, 3)), leaf(2 * normal(2, 3, seed=6)), leaf(LEVELS)
    shift, net, options = leaf(normal(3, seed=3)), Net(), injecting(solver)
    count = injections(z0.detach(), LEVELS, **options, solver=solver)
    noise, tensors = make_noise(kind, count, z0)
    method = gs.solvers.resolve(solver, options.get("eta"))
    model = parameterize(net, "x0")

    def loop():
        program = method.program(sigmas, model, churn=options.get("churn"), started=True)
        fitted = noise.prepare(z0, program.noises)
        return interpreted(program, model, z0, start, fitted, rule, shift)

    def run():
        return gs.sample(
            net,
            z0,
            sigmas,
            start=start,
            solver=solver,
            noise=noise,
            cond={"shift": shift},
            gradient=policy,
            memory=memory,
            **options,
        )

    assert_same(run, loop, [z0, start, sigmas, shift, *net.parameters(), *tensors])


def test_the_reversible_run():
    """Backward undoes every step, whatever it takes of the derivatives."""
    z0, net = leaf(normal(2, 3)), Net()
    for name in ("chosen", "detached", "no jacobian", "by step", "clipped"):
        policy, rule = POLICIES[name]
        options = {"solver": "midpoint_reversible", "gradient": policy}
        model = parameterize(net, "x0")
        program = gs.solvers.MidpointReversible().program(LEVELS, model)

        def loop(program=program, rule=rule, model=model):
            return interpreted(program, model, z0, None, None, rule, None)

        def run(options=options):
            return gs.sample(net, z0, LEVELS, memory="reversible", **options)

        assert_same(run, loop, [z0, *net.parameters()])


class Counted:
    def __init__(self):
        self.network, self.count = Net(), 0

    def __call__(self, x, sigma):
        self.count += 1
        return self.network(x, sigma)


@pytest.mark.parametrize(
    ("policy", "memory", "again"),
    [
        (None, "checkpoint", N),
        (policies.ChosenSteps([1]), "checkpoint", 1),
        (policies.ChosenSteps([1]), "offload", 1),
        (policies.LastSteps(2), "checkpoint", 2),
        (policies.DetachedInput(), "checkpoint", N),
        (policies.NoJacobian(), "checkpoint", 0),
        (policies.NoJacobian(), "store", 0),
    ],
)
def test_backward_calls_what_it_differentiates(policy, memory, again):
    denoiser, z0 = Counted(), leaf(normal(2, 3))
    options = {"churn": gs.Churn(0.9), "gradient": policy, "memory": memory}
    x = gs.sample(denoiser, z0, LEVELS, **options)
    assert denoiser.count == N
    x.sum().backward()
    assert denoiser.count == N + again


def test_truncated_is_the_policy_of_the_last_steps():
    z0, net = leaf(normal(2, 3)), Net()
    options = {"churn": gs.Churn(0.9)}
    memory = gs.memory.Truncated(2, "revolve:2")
    gradient = [policies.DetachedInput(), policies.LastSteps(2)]
    for truncated, whole in (
        ({"memory": memory}, {"gradient": gradient[1], "memory": "revolve:2"}),
        ({"memory": memory, "gradient": gradient[0]}, {"gradient": gradient}),
    ):
        xs = [gs.sample(net, z0, LEVELS, **options, **each) for each in (truncated, whole)]
        a, b = (torch.autograd.grad(x.sum(), [z0, *net.parameters()]) for x in xs)
        for g, w in zip(a, b, strict=True):
            assert_close(g, w)


def test_random_steps_are_drawn_for_each_run():
    z0, net = leaf(normal(2, 3)), Net()

    def gradient(policy):
        x = gs.sample(net, z0, LEVELS, gradient=policy, memory="checkpoint")
        return torch.autograd.grad(x.sum(), z0)[0]

    drawn = policies.RandomSteps(2, torch.Generator().manual_seed(3))
    found = [gradient(drawn) for _ in range(5)]
    same = torch.Generator().manual_seed(3)
    for each in found:
        steps = sorted(torch.randperm(N, generator=same)[:2].tolist())
        assert torch.equal(each, gradient(policies.ChosenSteps(steps)))
    assert len({tuple(each.flatten().tolist()) for each in found}) > 1


@memories
def test_step_maps_have_policies(memory):
    x, weight = leaf(normal(2, 3)), leaf(normal(3, seed=4))

    def step(x, i):
        return (x * weight + i).sin()

    found = gs.iterate(step, x, 4, gradient=policies.ScaledCotangent(0.5), memory=memory)
    y = x
    for i in range(4):
        y = y.clone()
        y.register_hook(lambda lam: 0.5 * lam)
        y = step(y, i)
    got, wanted = (torch.autograd.grad(each.sum(), [x, weight]) for each in (found, y))
    for g, w in zip(got, wanted, strict=True):
        assert_close(g, w)


def test_what_receives_nothing_is_said():
    z0, start, net = leaf(normal(2, 3)), leaf(normal(2, 3)), Net()
    nothing = policies.NoJacobian()
    with pytest.warns(UserWarning, match="gradient=NoJacobian: the gradient to z0 is zero, since"):
        x = gs.sample(net, z0, [2.0, 1.0, 0.0], gradient=nothing)  # the last state is D
    assert not torch.autograd.grad(x.sum(), z0, allow_unused=True)[0].any()
    options = {"solver": "euler_ancestral", "gradient": policies.LastSteps(1)}
    with pytest.warns(UserWarning, match="gradient=LastSteps: start receives no gradient, since"):
        gs.sample(net, z0, LEVELS, start=start, **options)
    gs.sample(net, z0, LEVELS, gradient=nothing)  # reaches it around the network
    gs.sample(net, z0.detach(), LEVELS, gradient=policies.LastSteps(1))
    with torch.no_grad():
        gs.sample(net, z0, [2.0, 1.0, 0.0], gradient=nothing)


def test_names_say_that_they_are_not_exact():
    listed = [getattr(policies, name) for name in policies.__all__]
    classes = [x for x in listed if isinstance(x, type) and issubclass(x, policies.Policy)]
    for kind in {*classes} - {policies.Policy, policies.Exact}:
        assert "not" in kind.__doc__.split("\n")[0], kind
        assert "gradient of the run" in kind.__doc__ or "that of the run" in kind.__doc__
    assert policies.Together([policies.Exact()]).exact
    assert not any(each.exact for each, _ in [*POLICIES.values()][1:] if not isinstance(each, list))


def test_a_check_names_the_argument():
    z0, net = leaf(normal(2, 3)), Net()
    report = gs.check(net, z0, LEVELS, gradient=policies.DetachedInput(), churn=gs.Churn(0.9))
    (link,) = report.broken
    assert link.startswith("the gradient of the run to z0, which gradient= says not to be: ")


def test_optimize_takes_a_policy(tmp_path):
    z0 = leaf(normal(2, 3))
    options = {"steps": 2, "checkpoint": tmp_path / "run", "solver": "euler_ancestral"}

    def optimized(policy):
        return gs.optimize(
            Net(), z0, LEVELS, lambda x: x.square().mean(), gradient=policy, **options
        )

    found = optimized(policies.ClippedCotangent(1.0))
    assert found.history[1].loss < found.history[0].loss
    with pytest.raises(ValueError, match="gradient"):
        optimized(policies.ClippedCotangent(2.0))


REFUSED = {
    "kind": (lambda: {"gradient": "last"}, TypeError, "gradient must be a policy of gradsampler.p"),
    "item": (lambda: {"gradient": [3]}, TypeError, r"gradient\[0\] must be a policy of"),
    "empty": (lambda: {"gradient": []}, ValueError, "gradient must hold a policy at least"),
    "twice": (
        lambda: {"gradient": [policies.LastSteps(1), policies.LastSteps(2)]},
        ValueError,
        "LastSteps once at most",
    ),
    "beyond": (
        lambda: {"gradient": policies.ChosenSteps([7])},
        ValueError,
        "ChosenSteps: steps must lie within a run of 4 steps, got 7",
    ),
    "many": (
        lambda: {"gradient": policies.RandomSteps(5)},
        ValueError,
        "RandomSteps: count must be at most 4, the steps, got 5",
    ),
    "factors": (
        lambda: {"gradient": policies.ScaledCotangent([1.0, 2.0])},
        ValueError,
        "ScaledCotangent: factor must hold one number a step, 4, got 2",
    ),
    "undone": (
        lambda: {
            "gradient": policies.LastSteps(2),
            "memory": "reversible",
            "solver": "midpoint_reversible",
        },
        ValueError,
        "memory must be a strategy for the last steps alone, got Reversible; take memory='ch",
    ),
    "steps": (lambda: policies.ChosenSteps(3), TypeError, "steps must be a list of ints, got int"),
    "count": (lambda: policies.RandomSteps(0), ValueError, "count must be at least 1, got 0"),
    "generator": (lambda: policies.RandomSteps(1, 3), TypeError, "be a torch.Generator, got int"),
    "negative": (lambda: policies.ClippedCotangent(-1.0), ValueError, "norm must be a finite num"),
    "last": (lambda: policies.LastSteps(0), ValueError, "LastSteps: steps must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_call(case):
    make, kind, message = REFUSED[case]
    denoiser = Counted()
    with pytest.raises(kind, match=message):
        gs.sample(denoiser, leaf(normal(2, 3)), LEVELS, **make())
    assert denoiser.count == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own
def test_forward_mode_is_refused():
    z0, monitor = normal(2, 3), gs.Monitor()

    def run(**options):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(z0, z0)
            return gs.sample(Net(), dual, LEVELS, memory="store", **options)

    with pytest.raises(ValueError, match=r"gradient must be None under .*, got DetachedInput"):
        run(gradient=policies.DetachedInput())
    with pytest.raises(ValueError, match=r"monitor must be None under .*, got Monitor"):
        run(monitor=monitor)
    run(gradient=policies.Exact())


# The page.


def test_every_block_of_the_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "gradient-policies.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    given = {"denoiser": gs.EDM(Net(dtype=torch.float32)), "z0": leaf(normal(2, 3).float())}
    exec(compile("\n".join(blocks), "docs/gradient-policies.md", "exec"), given)
    assert given["z0"].grad.any()
    assert len(given["report"].calls) == 12
    assert "cosine to the gradient of the run: z0" in capsys.readouterr().out


def test_the_page_lists_every_policy():
    page = (Path(__file__).parents[1] / "docs" / "gradient-policies.md").read_text()
    listed = set(re.findall(r"`([A-Z]\w+)\(", page.split("| `gs.policies.`")[1].split("\n\n")[0]))
    assert listed == set(policies.__all__) - {"Exact", "Policy", "Together", "applied", "resolve"}
