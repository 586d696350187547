# SPDX-License-Identifier: Apache-2.0
"""Guidance as pipelines do it: one call of 2B, an interval, several conditions, flow time."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import gradsampler as gs
from support.problems import normal

F64 = torch.float64
LEVELS = [3.0, 1.6, 0.7, 0.2]
MEMORIES = ["store", "checkpoint", "revolve:2", "auto"]
memories = pytest.mark.parametrize("memory", MEMORIES)
PAGE = Path(__file__).parents[1] / "docs" / "guidance.md"


def network(x, sigma, text, image=None):
    """Sees a prompt [B, 4] and an image prompt, and its level."""
    shift = text.mean(1, keepdim=True) + (0 if image is None else image[0].sin())
    return torch.tanh(x + shift) * 0.4 + 0.5 * x / (1 + sigma.view(-1, 1) ** 2)


def leaves():
    """z0, the prompt, a negative one, and an image prompt."""
    shapes = [(2, 5), (2, 4), (1, 4), (2, 5)]
    return [normal(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]


def guided(x, s, text, negative, image, scale):
    level = torch.as_tensor(s, dtype=F64).expand(2)
    plain = network(x, level, negative.expand(2, 4), [image])
    return plain + scale * (network(x, level, text, [image]) - plain)


def loop(z0, predict, levels=LEVELS):
    x = levels[0] * z0
    for s, t in pairwise(levels):
        x = x + (t - s) * (x - predict(x, s)) / s
    return x


def assert_same(got, expected, inputs, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    lam = normal(*got.shape, seed=9)
    found = torch.autograd.grad(got, inputs, lam)
    wanted = torch.autograd.grad(expected, inputs, lam)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Counted:
    """A network that notes its batch sizes."""

    def __init__(self, network=network):
        self.network, self.sizes = network, []

    def __call__(self, x, sigma, **cond):
        self.sizes.append(len(x))
        return self.network(x, sigma, **cond)


@memories
@pytest.mark.parametrize("batched", [False, True])
def test_a_batched_call_is_two_calls(batched, memory):
    z0, text, negative, image = leaves()
    counted, scale = Counted(), torch.tensor(2.5, dtype=F64, requires_grad=True)
    model = gs.Guided(counted, scale, {"text": negative.expand(2, 4)}, batched=batched)
    options = {"cond": {"text": text, "image": [image]}, "memory": memory}
    got = gs.sample(model, z0, LEVELS, **options)
    assert set(counted.sizes) == {4 if batched else 2}
    expected = loop(z0, lambda x, s: guided(x, s, text, negative, image, scale))
    assert_same(got, expected, [z0, text, negative, image, scale])


def test_one_row_stands_for_all_samples():
    z0, text, negative, image = leaves()
    options = {"cond": {"text": text, "image": [image]}}
    model = gs.Guided(network, 2.5, {"text": negative}, batched=True)
    got = gs.sample(model, z0, LEVELS, **options)
    expected = loop(z0, lambda x, s: guided(x, s, text, negative, image, 2.5))
    torch.testing.assert_close(got, expected)


def test_what_does_not_differ_is_passed_on_as_it_is():
    table, seen = torch.ones(7, 7), []

    def net(x, sigma, label, extra, mode):
        seen.append((label.tolist(), torch.equal(extra, table), mode, len(sigma)))
        return 0.5 * x

    model = gs.Guided(net, 2.0, {"label": torch.tensor([9])}, batched=True)
    cond = {"label": torch.tensor([1, 2]), "extra": table, "mode": "fast"}
    gs.sample(model, normal(2, 5), [2.0, 1.0], cond=cond)
    assert seen == [([9, 9, 1, 2], True, "fast", 4)]


@memories
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_an_interval_of_levels(solver, batched, memory):
    z0, text, negative, image = leaves()
    counted = Counted()
    unconditional = {"text": negative.expand(2, 4)}
    model = gs.Guided(counted, 2.5, unconditional, batched, interval=(0.5, 2.0))
    options = {"cond": {"text": text, "image": [image]}, "memory": memory}
    got = gs.sample(model, z0, LEVELS, solver=solver, **options)
    inside, outside = {"euler": (2, 1), "heun": (4, 2)}[solver]
    if memory == "store":
        assert sum(counted.sizes) // 2 == 2 * inside + outside

    def predict(x, s):
        return guided(x, s, text, negative, image, 2.5 if 0.5 <= s <= 2.0 else 1.0)

    x = LEVELS[0] * z0
    for s, t in pairwise(LEVELS):
        slope = (x - predict(x, s)) / s
        ahead = x + (t - s) * slope
        x = ahead
        if solver == "heun":
            x = x + (t - s) / 2 * ((ahead - predict(ahead, t)) / t - slope)
    assert_same(got, x, [z0, text, negative, image])


def test_the_interval_holds_outside_of_a_run_too():
    z0, text, negative, image = leaves()
    model = gs.Guided(network, 2.5, {"text": negative.expand(2, 4)}, interval=(0.5, 2.0))
    sigma = torch.tensor([0.3, 1.0], dtype=F64)
    got = model(z0, sigma, text=text, image=[image])
    rows = [guided(z0, sigma, text, negative, image, w) for w in (1.0, 2.5)]
    torch.testing.assert_close(got, torch.stack([rows[0][0], rows[1][1]]))


def test_a_plan_for_a_run_that_is_guided_in_part():
    z0, text, negative, image = (x.detach() for x in leaves())
    model = gs.Guided(network, 2.5, {"text": negative}, True, (0.5, 2.0))
    options = {"cond": {"text": text, "image": [image]}, "budget": "1GB"}
    plan = gs.memory.plan(model, z0, LEVELS, **options)
    whole = gs.memory.plan(gs.Guided(network, 2.5, {"text": negative}), z0, LEVELS, **options)
    assert [row.name for row in plan] == [row.name for row in whole]
    assert plan.rows[0].peak > 0


@memories
@pytest.mark.parametrize("batched", [False, True])
def test_several_conditions_with_weights(batched, memory):
    z0, text, negative, image = leaves()
    other = normal(2, 4, seed=8).requires_grad_()
    weights = [torch.tensor(1.5, dtype=F64, requires_grad=True), [0.5, 1.0, 2.0]]
    model = gs.Guided(
        network,
        weights,
        {"text": negative.expand(2, 4)},
        batched,
        conditions=[{}, {"text": other}],
    )
    options = {"cond": {"text": text, "image": [image]}, "memory": memory}
    got = gs.sample(model, z0, LEVELS, **options)

    def predict(x, s):
        level, step = torch.full((2,), s, dtype=F64), LEVELS.index(s)
        plain = network(x, level, negative.expand(2, 4), [image])
        one, two = (network(x, level, each, [image]) for each in (text, other))
        return plain + weights[0] * (one - plain) + weights[1][step] * (two - plain)

    assert_same(got, loop(z0, predict), [z0, text, other, negative, image, weights[0]])


def test_outside_of_the_interval_conditions_keep_their_shares():
    z0, text, negative, image = leaves()
    other = normal(2, 4, seed=8)
    conditions = [{}, {"text": other}]
    unconditional, interval = {"text": negative}, (0.0, 0.5)
    model = gs.Guided(network, [3.0, 1.0], unconditional, False, interval, conditions=conditions)
    got = gs.sample(model, z0, [3.0, 1.0], cond={"text": text, "image": [image]})
    level = torch.full((2,), 3.0, dtype=F64)
    one, two = (network(3 * z0, level, each, [image]) for each in (text, other))
    denoised = 0.75 * one + 0.25 * two
    torch.testing.assert_close(got, 3 * z0 - 2 * (3 * z0 - denoised) / 3)


def test_scales_that_add_up_to_nothing_have_no_shares():
    conditions, options = [{}, {"text": normal(2, 4)}], {"cond": {"text": normal(2, 4)}}
    model = gs.Guided(network, [1.0, -1.0], {}, False, (0.0, 2.0), conditions=conditions)
    with pytest.raises(ValueError, match="scale must not add up to 0 where interval is given, got"):
        gs.sample(model, normal(2, 5), LEVELS, **options)


def test_guidance_in_flow_time():
    """A plain callable predicts what the run is told, under guidance too."""
    z0, text, negative, image = leaves()
    times = [1.0, 0.6, 0.3, 0.0]
    model = gs.Guided(network, 2.5, {"text": negative}, batched=True)
    options = {"cond": {"text": text, "image": [image]}, "prediction": "flow"}
    got = gs.sample(model, z0, times, **options)
    x = z0
    for s, t in pairwise(times):
        x = x + (t - s) * guided(x, s, text, negative, image, 2.5)
    torch.testing.assert_close(got, x)
    with pytest.raises(ValueError, match="prediction must be 'x0' for a denoiser wrapped in Guide"):
        gs.sample(gs.Guided(gs.EDM(network), 2.5, {}), z0, times, prediction="flow")


@memories
def test_guidance_of_guidance(memory):
    """Two scales, as of text and image in InstructPix2Pix, batched as four."""
    z0, text, negative, image = leaves()
    counted = Counted()
    blank = torch.zeros(2, 5, dtype=F64)
    inner = gs.Guided(counted, 2.0, {"text": negative}, batched=True)
    model = gs.Guided(inner, 1.5, {"image": [blank]}, batched=True)
    got = gs.sample(model, z0, LEVELS, cond={"text": text, "image": [image]}, memory=memory)
    assert set(counted.sizes) == {8}

    def predict(x, s):
        without = guided(x, s, text, negative, blank, 2.0)
        return without + 1.5 * (guided(x, s, text, negative, image, 2.0) - without)

    assert_same(got, loop(z0, predict), [z0, text, negative, image])


def test_levels_of_each_sample_enter_the_interval_one_by_one():
    z0, text, negative, image = leaves()
    sigmas = torch.tensor([[3.0, 1.8], [1.6, 0.4], [0.7, 0.3]], dtype=F64)
    options = {"cond": {"text": text, "image": [image]}}
    model = gs.Guided(network, 2.5, {"text": negative}, batched=True, interval=(0.5, 2.0))
    got = gs.sample(model, z0, sigmas, **options)
    x = sigmas[0][:, None] * z0
    for s, t in pairwise(sigmas):
        scale = torch.where((s >= 0.5) & (s <= 2.0), 2.5, 1.0)[:, None]
        x = x + ((t - s) / s)[:, None] * (x - guided(x, s, text, negative, image, scale))
    torch.testing.assert_close(got, x)


COND = {"text": torch.zeros(2, 4, dtype=F64)}
REFUSED = {
    "keys": (
        {"image": [normal(2, 5)]},
        COND,
        "Guided: the branches of a batched call must have the same arguments, got image in some",
    ),
    "length": (
        {"text": torch.zeros(2, 7)},
        COND,
        r"Guided: 'text' in a batched call must have one shape in all branches, got \[2, 7\], ",
    ),
    "rows": (
        {"text": torch.zeros(3, 4)},
        COND,
        r"Guided: 'text' in a batched call must be tensors \[2, \.\.\.\] where the branches differ",
    ),
    "kind": (
        {"mode": "plain"},
        {**COND, "mode": "full"},
        r"Guided: 'mode' in a batched call must be tensors \[2, \.\.\.\] where the branches differ",
    ),
    "structure": (
        {"text": [torch.zeros(2, 4)]},
        COND,
        "Guided: 'text' in a batched call must have the same structure in all branches",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_branches_that_make_no_batch_are_refused(case):
    unconditional, cond, message = REFUSED[case]
    model = gs.Guided(lambda x, s, **_: x, 2.0, unconditional, batched=True)
    with pytest.raises(ValueError, match=message):
        gs.sample(model, normal(2, 5), LEVELS, cond=cond)


MADE = {
    "interval": (lambda: {"interval": 3.0}, TypeError, r"be a pair \(low, high\) of levels"),
    "order": (lambda: {"interval": (2.0, 1.0)}, ValueError, r"be \(low, high\) with low <= high"),
    "nan": (lambda: {"interval": (0.0, math.nan)}, ValueError, r"interval\[1\] must be a finite"),
    "batched": (lambda: {"batched": 1}, TypeError, "batched must be True or False, got int"),
    "conditions": (lambda: {"conditions": {}}, TypeError, "conditions must be a list of dicts"),
    "none": (lambda: {"conditions": [], "scale": []}, ValueError, "hold a dict at least"),
    "weights": (lambda: {"conditions": [{}]}, TypeError, "scale must be a list, one for each"),
    "count": (lambda: {"conditions": [{}], "scale": [1, 2]}, ValueError, "each of the 1 conditio"),
}


@pytest.mark.parametrize("case", MADE)
def test_arguments_are_checked_when_it_is_made(case):
    make, kind, message = MADE[case]
    with pytest.raises(kind, match=message):
        gs.Guided(network, **({"scale": 2.0, "unconditional": {}} | make()))


# The page.


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


class Prompted(nn.Module):
    """A small network that the page's examples guide: x, a level and a prompt [B, 8]."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 16)

    def forward(self, x, level, prompt):
        shift = self.mix(prompt).view(-1, 1, 4, 4)
        return torch.tanh(x + shift) * torch.cos(0.1 * level.view(-1, 1, 1, 1))


def ran(upto):
    torch.manual_seed(0)
    given = {"__name__": "page", "network": Prompted()}
    given["z0"] = torch.randn(2, 1, 4, 4).requires_grad_()
    given["prompt"], given["negative"] = torch.randn(2, 8), torch.zeros(1, 8)
    for block in blocks()[: upto + 1]:
        exec(compile(block, "docs/guidance.md", "exec"), given)
    return given


@pytest.mark.parametrize("k", range(len(re.findall("```python", PAGE.read_text()))))
def test_every_block_of_the_page_runs(k):
    ran(k)


def test_the_nonlinear_forms_are_their_formulas():
    """On known predictions: the rescaled deviation, no parallel part, the projected scale."""
    given = ran(len(blocks()))
    plain, full = torch.randn(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    rescaled = given["rescaled"](plain, full, 5.0, 1.0)
    for a, b in zip(rescaled, full, strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=1e-6)
    guided = plain + 5.0 * (full - plain)
    torch.testing.assert_close(given["rescaled"](plain, full, 5.0, 0.0), guided)
    change = given["apg"](plain, full, 5.0) - full
    for a, b in zip(change, full, strict=True):
        assert (a * b).sum().item() == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(given["apg"](plain, full, 5.0, 1.0), guided)
    for k in (0.5, -2.0):
        torch.testing.assert_close(given["cfg_zero_star"](plain, k * plain, 5.0), k * plain)
