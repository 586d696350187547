# SPDX-License-Identifier: Apache-2.0
"""Optimisation of z0: its numbers, its checkpoint, and what bad input gets.

The oracle is a plain loop: samplers as the papers write them, autograd, and Adam by hand.
"""

import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import nn

import gradsampler as gs
from support.problems import Gaussian, Mixture, normal
from support.tiers import few

LEVELS = gs.schedules.karras(5, sigma_min=0.1, sigma_max=6.0)
SHAPE = (3, 2, 4)
CHURN = 1.0


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads only get into each other's way where a tensor has 24 elements."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(seed=0, dtype=torch.float64):
    return normal(*SHAPE, seed=seed).to(dtype).requires_grad_()


def curved(seed=3):
    """A smooth denoiser whose every output depends on all inputs of its sample."""
    return Mixture(SHAPE[1] * SHAPE[2], seed=seed).denoise


def target_loss(x):
    return (x - 1).square().mean()


class Calls:
    """A denoiser that counts its calls."""

    def __init__(self, inner=None):
        self.count = 0
        self._inner = inner or curved()

    def __call__(self, x, sigma):
        self.count += 1
        return self._inner(x, sigma)


class Failing:
    """A loss that raises, or does what it is told, from its call number ``at`` on."""

    def __init__(self, at, action):
        self.count = 0
        self._at, self._action = at, action

    def __call__(self, x):
        self.count += 1
        return self._action(x) if self.count > self._at else target_loss(x)


def interrupt(*_):
    raise KeyboardInterrupt


def numbers(result):
    """All of a history that two runs must share: everything but the seconds."""
    return [step[:3] for step in result.history]


def assert_same(one, other):
    assert numbers(one) == numbers(other)
    assert torch.equal(one.z0, other.z0)
    assert torch.equal(one.sample, other.sample)


# ------------------------------------------------------------------ an independent sampler


def churned(levels, noise, z0):
    """EDM's churn (algorithm 2, lines 4 to 6): from step, state, level to a raised state, level."""
    n = len(levels) - 1
    eta = min(CHURN / n, math.sqrt(2) - 1)
    if noise is None:
        return lambda i, x, s: (x, s)

    def raise_level(i, x, s):
        hat = s * (1 + eta)
        return x + math.sqrt(hat**2 - s**2) * noise.at(z0, i, n), hat

    return raise_level


def euler_loop(denoise, z0, noise):
    levels = LEVELS.tolist()
    raise_level, x = churned(levels, noise, z0), levels[0] * z0
    for i, (s, t) in enumerate(pairwise(levels)):
        x, s = raise_level(i, x, s)
        x = x + (t - s) * (x - denoise(x, s)) / s
    return x


def heun_loop(denoise, z0, noise):
    levels = LEVELS.tolist()
    raise_level, x = churned(levels, noise, z0), levels[0] * z0
    for i, (s, t) in enumerate(pairwise(levels)):
        x, s = raise_level(i, x, s)
        slope = (x - denoise(x, s)) / s
        ahead = x + (t - s) * slope
        x = x + (t - s) * (slope + (ahead - denoise(ahead, t)) / t) / 2
    return x


LOOPS = {"euler": euler_loop, "heun": heun_loop}


def adam_loop(sample, z0, *, steps, lr, sign=1.0, penalty=None, clip=None):
    """Adam (Kingma and Ba 2015, algorithm 1) by hand; a row for each step, and the noise."""
    z = z0.detach().clone()
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    rows = []
    for k in range(1, steps + 1):
        z.requires_grad_()
        loss = target_loss(sample(z))
        total = sign * loss + (0 if penalty is None else penalty(z))
        (g,) = torch.autograd.grad(total, z)
        z = z.detach()
        size = math.sqrt((g**2).sum())
        rows.append((loss.item(), size, math.sqrt((z**2).mean())))
        if clip is not None and size > clip:
            g = g * (clip / size)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        slope = first / (1 - 0.9**k)
        scale = (second / (1 - 0.999**k)).sqrt() + 1e-8
        z = z - lr * slope / scale
    return rows, z


def squared(z):
    return 0.3 * (z**2).sum()


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("solver", sorted(LOOPS))
@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"maximize": True}, {"sign": -1.0}, id="maximize"),
        pytest.param({"regularizer": squared}, {"penalty": squared}, id="regularizer"),
        pytest.param(
            {"maximize": True, "regularizer": squared},
            {"sign": -1.0, "penalty": squared},
            id="the regularizer stays a penalty",
        ),
    ],
)
@pytest.mark.parametrize(
    "noise", [gs.noise.SignedRoll(seed=4), gs.noise.SinCos()], ids=["signed_roll", "sincos"]
)
def test_agrees_step_by_step_with_adam_by_hand(solver, noise, options, by_hand, memory):
    denoise, z0 = curved(), start()
    result = gs.optimize(
        denoise,
        z0,
        LEVELS,
        target_loss,
        steps=8,
        lr=0.07,
        solver=solver,
        noise=noise,
        churn=gs.Churn(CHURN),
        memory=memory,
        **options,
    )
    loop = LOOPS[solver]
    rows, z = adam_loop(lambda z: loop(denoise, z, noise), z0, steps=8, lr=0.07, **by_hand)
    expected = torch.tensor(rows, dtype=torch.float64)
    found = torch.tensor(numbers(result), dtype=torch.float64)
    assert ((found - expected).abs() / expected.abs()).max() < 1e-12
    assert (result.z0 - z).norm() / z.norm() < 1e-12
    x = loop(denoise, z, noise)
    assert (result.sample - x).norm() / x.norm() < 1e-12


def test_grad_clip_bounds_what_the_optimizer_sees():
    denoise, z0 = curved(), start()
    sizes = [step.gradient_norm for step in gs.optimize(denoise, z0, LEVELS, target_loss).history]
    clip = sorted(sizes)[len(sizes) // 2]  # bites in half of the steps
    result = gs.optimize(denoise, z0, LEVELS, target_loss, steps=12, grad_clip=clip, lr=0.05)
    rows, z = adam_loop(lambda z: gs.sample(denoise, z, LEVELS), z0, steps=12, lr=0.05, clip=clip)
    found = [step.gradient_norm for step in result.history]
    assert max(found) > clip, "the history must hold the norm before clipping"
    assert found == pytest.approx([row[1] for row in rows], rel=1e-5)
    # torch's clip_grad_norm_ divides by norm + 1e-6, which the loop by hand does not.
    assert (result.z0 - z).norm() / z.norm() < 1e-4


def test_one_clipped_sgd_step_has_the_length_of_the_clip():
    z0 = start()
    result = gs.optimize(
        curved(),
        z0,
        LEVELS,
        lambda x: 1e3 * target_loss(x),
        steps=1,
        lr=1.0,
        optimizer=torch.optim.SGD,
        grad_clip=0.125,
    )
    assert float((result.z0 - z0.detach()).norm()) == pytest.approx(0.125, rel=1e-6)
    assert result.history[0].gradient_norm > 1


# ------------------------------------------------------------------ closed forms


def affine_map(sample, shape):
    """(M, b) of an affine sampler on flattened single samples: x = M z + b."""
    size = math.prod(shape)
    with torch.no_grad():
        b = sample(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        columns = sample(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1)
    return (columns - b).T, b


class SameSigns(gs.noise.NoiseSource):
    """A signed permutation that is the same for each sample, written without Philox."""

    def at(self, z0, step, num_steps):
        flat = z0.flatten(1)
        signs = torch.tensor([(-1.0) ** ((j * (step + 2)) // 3) for j in range(flat.shape[1])])
        return (signs.to(z0.dtype) * flat.roll(step + 1, 1)).view(z0.shape)


@pytest.mark.parametrize("weight", [0.0, 0.4], ids=["plain", "ridge"])
def test_follows_the_closed_form_of_gradient_descent_on_a_linear_gaussian_problem(weight):
    """z_k = z* + (I - lr H)^k (z_0 - z*), H = M'M + w, z* = H^-1 M'(target - b)."""
    problem, noise = Gaussian(0.3, 0.5), SameSigns()
    m, b = affine_map(lambda z: euler_loop(problem.denoise, z, noise), (2, 3))
    goal = normal(6, seed=8)
    hessian = m.T @ m + weight * torch.eye(6, dtype=torch.float64)
    best = torch.linalg.solve(hessian, m.T @ (goal - b))
    z0 = normal(1, 2, 3, seed=1).requires_grad_()
    lr = 1 / float(torch.linalg.eigvalsh(hessian).max())
    found = gs.optimize(
        problem.denoise,
        z0,
        LEVELS,
        lambda x: (x.flatten() - goal).square().sum() / 2,
        steps=25,
        lr=lr,
        optimizer=torch.optim.SGD,
        regularizer=lambda z: weight * z.square().sum() / 2,
        noise=noise,
        churn=gs.Churn(CHURN),
    )
    contraction = torch.eye(6, dtype=torch.float64) - lr * hessian
    error = z0.detach().flatten() - best
    for k, step in enumerate(found.history):
        z = best + torch.linalg.matrix_power(contraction, k) @ error
        loss = (m @ z + b - goal).square().sum() / 2
        assert step.loss == pytest.approx(float(loss), rel=1e-10)
        assert step.z0_norm == pytest.approx(float(z.square().mean().sqrt()), rel=1e-10)
    z = best + torch.linalg.matrix_power(contraction, 25) @ error
    assert torch.allclose(found.z0.flatten(), z, rtol=1e-10, atol=1e-10)


@pytest.mark.thorough
def test_reaches_the_closed_form_optimum_with_adam():
    """Without noise the map is x = a z + b for each element by itself."""
    problem, goal, weight = Gaussian(-0.2, 0.6), normal(1, 2, 3, seed=8), 0.1
    m, offset = affine_map(lambda z: heun_loop(problem.denoise, z, None), (1,))
    a, b = float(m), float(offset)
    best = a * (goal - b) / (a * a + weight)
    found = gs.optimize(
        problem.denoise,
        normal(1, 2, 3, seed=1).requires_grad_(),
        LEVELS,
        lambda x: (x - goal).square().sum() / 2,
        steps=400,
        lr=0.05,
        regularizer=lambda z: weight * z.square().sum() / 2,
        solver="heun",
    )
    assert (found.z0 - best).abs().max() < 1e-4
    assert (found.sample - (a * best + b)).abs().max() < 1e-4


# ------------------------------------------------------------------ what is left alone


def test_leaves_the_caller_s_tensors_alone():
    z0 = start()
    before, gradient = z0.detach().clone(), torch.full(SHAPE, 2.0, dtype=torch.float64)
    z0.grad = gradient
    levels = LEVELS.clone().requires_grad_()
    result = gs.optimize(curved(), z0, levels, target_loss, steps=3)
    assert torch.equal(z0, before)
    assert z0.grad is gradient
    assert torch.equal(gradient, torch.full(SHAPE, 2.0, dtype=torch.float64))
    assert levels.grad is None
    assert result.z0.data_ptr() != z0.data_ptr()
    assert not result.z0.requires_grad
    assert not result.sample.requires_grad


def test_z0_need_not_be_a_leaf():
    z0 = start()
    assert_same(
        gs.optimize(curved(), 2 * z0, LEVELS, target_loss, steps=2),
        gs.optimize(curved(), (2 * z0).detach().requires_grad_(), LEVELS, target_loss, steps=2),
    )


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_a_trainable_denoiser_accumulates_nothing(memory):
    network = nn.Linear(4, 4).double()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    network.weight.grad = torch.full((4, 4), 3.0, dtype=torch.float64)
    weights = [p.detach().clone() for p in network.parameters()]
    gs.optimize(
        lambda x, sigma, scale: scale * network(x).tanh(),
        start(),
        LEVELS,
        lambda x: (scale * x).square().mean(),
        steps=2,
        memory=memory,
        cond={"scale": scale},
    )
    assert torch.equal(network.weight.grad, torch.full((4, 4), 3.0, dtype=torch.float64))
    assert network.bias.grad is None
    assert scale.grad is None
    assert all(map(torch.equal, network.parameters(), weights))


def test_history_has_a_line_for_each_step():
    z0, steps = start(), 4
    result = gs.optimize(curved(), z0, LEVELS, target_loss, steps=steps)
    assert result.history[0]._fields == ("loss", "gradient_norm", "z0_norm", "seconds")
    assert len(result.history) == steps
    assert all(type(value) is float for step in result.history for value in step)
    assert all(step.seconds > 0 for step in result.history)
    x = gs.sample(curved(), z0, LEVELS)
    (gradient,) = torch.autograd.grad(target_loss(x), z0)
    first = result.history[0]
    assert first.loss == target_loss(x).item()
    assert first.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-14)
    assert first.z0_norm == pytest.approx(z0.detach().square().mean().sqrt().item(), rel=1e-14)
    assert torch.equal(result.sample, gs.sample(curved(), result.z0, LEVELS))


def test_the_bar_shows_loss_and_gradient_norm(capfd):
    gs.optimize(curved(), start(), LEVELS, target_loss, steps=2, progress=True)
    shown = capfd.readouterr()
    assert "2/2" in shown.err
    assert "loss=" in shown.err
    assert "grad=" in shown.err
    gs.optimize(curved(), start(), LEVELS, target_loss, steps=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_keeps_the_dtype_of_z0(dtype):
    result = gs.optimize(
        lambda x, sigma: 0.5 * x, start(dtype=dtype), LEVELS, target_loss, steps=3, lr=0.1
    )
    assert result.z0.dtype == result.sample.dtype == dtype
    assert result.history[-1].loss < result.history[0].loss


# ------------------------------------------------------------------ the norm regulariser


@pytest.mark.parametrize("d", [2, 3, 64, 3072])
def test_chi_norm_is_the_negative_log_density_up_to_a_constant(d):
    radii = torch.tensor([0.3, 0.8, 1.0, 1.1, 2.0], dtype=torch.float64) * math.sqrt(d)
    directions = normal(len(radii), d, seed=d)
    z = radii[:, None] * directions / directions.norm(dim=1, keepdim=True)
    penalties = torch.stack([gs.regularizers.ChiNorm()(row[None]) for row in z])
    total = penalties + torch.as_tensor(scipy.stats.chi.logpdf(radii.numpy(), d))
    assert (total - total[0]).abs().max() < 1e-11 * d


@pytest.mark.parametrize("d", [2, 12, 64])
def test_chi_norm_is_least_at_the_mode_and_pulls_towards_it(d):
    direction = normal(1, d, seed=d)
    direction = direction / direction.norm()

    def at(factor):
        z = (factor * math.sqrt(d - 1) * direction).requires_grad_()
        value = gs.regularizers.ChiNorm()(z)
        (gradient,) = torch.autograd.grad(value, z)
        return value.item(), float((gradient * direction).sum()), gradient

    value, outward, gradient = at(1.0)
    assert value == pytest.approx(0.0, abs=1e-12 * d)
    assert gradient.abs().max() < 1e-12 * d
    for factor in (0.5, 0.9):
        value, outward, _ = at(factor)
        assert value > 0
        assert outward < 0, "descent must lengthen a short z0"
    for factor in (1.1, 2.0):
        value, outward, _ = at(factor)
        assert value > 0
        assert outward > 0, "descent must shorten a long z0"


def test_chi_norm_is_weighted_and_a_mean_over_samples():
    z = normal(5, 2, 3, 4)
    each = torch.stack([gs.regularizers.ChiNorm()(row[None]) for row in z])
    assert each.std() > 1e-3
    assert float(gs.regularizers.ChiNorm()(z)) == pytest.approx(float(each.mean()), rel=1e-12)
    assert float(gs.regularizers.ChiNorm(2.5)(z)) == pytest.approx(
        2.5 * float(each.mean()), rel=1e-12
    )
    assert torch.autograd.gradcheck(gs.regularizers.ChiNorm(0.7), z.requires_grad_())


def test_chi_norm_holds_the_norm_of_the_noise():
    def norm(weight):
        result = gs.optimize(
            lambda x, sigma: 0.5 * x,
            normal(4, 64).requires_grad_(),
            LEVELS,
            lambda x: x.square().mean(),
            steps=60,
            lr=0.05,
            regularizer=gs.regularizers.ChiNorm(weight),
        )
        return result.z0.norm(dim=1) / 8

    assert norm(0.0).max() < 0.5
    assert (norm(1.0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "1", True], ids=repr)
def test_chi_norm_refuses_a_weight(weight):
    with pytest.raises((ValueError, TypeError), match="ChiNorm: weight must be a "):
        gs.regularizers.ChiNorm(weight)


def test_chi_norm_refuses_single_elements():
    with pytest.raises(ValueError, match="ChiNorm: z0 must hold at least 2 elements"):
        gs.regularizers.ChiNorm()(torch.ones(3, 1))


# ------------------------------------------------------------------ interrupted and resumed


STEPS, STOP = 7, 4


def recoverable(denoiser, loss, checkpoint, *, steps=STEPS, **options):
    """One run of the tests below."""
    settings = {
        "lr": 0.1,
        "solver": "heun",
        "noise": gs.noise.SignedRoll(seed=2),
        "churn": gs.Churn(CHURN),
        "regularizer": gs.regularizers.ChiNorm(0.1),
        "checkpoint": checkpoint,
    }
    return gs.optimize(denoiser, start(), LEVELS, loss, steps=steps, **settings | options)


def interrupted(path, **options):
    """The state on disk after a Ctrl-C in step number STOP."""
    with pytest.raises(KeyboardInterrupt):
        recoverable(curved(), Failing(STOP, interrupt), path, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="adam"),
        pytest.param({"optimizer": lambda p, lr: torch.optim.SGD(p, lr, 0.9)}, id="sgd"),
        pytest.param({"maximize": True, "lr": 0.01}, id="maximize"),
        pytest.param({"grad_clip": 0.1}, id="grad_clip"),
        pytest.param({"memory": "store"}, id="store"),
        pytest.param({"solver": "euler_ancestral", "churn": None}, id="ancestral"),
    ],
)
@pytest.mark.parametrize("stop", few([0, 1, STOP, STEPS - 1], STOP))
def test_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, stop, options):
    path = tmp_path / "run.ckpt"
    whole = recoverable(curved(), target_loss, None, **options)
    with pytest.raises(KeyboardInterrupt):
        recoverable(curved(), Failing(stop, interrupt), path, **options)
    assert path.exists() == (stop > 0)
    rest = Failing(STEPS, interrupt)
    assert_same(recoverable(curved(), rest, path, **options), whole)
    assert rest.count == STEPS - stop, "only the missing steps may be computed"
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_can_be_interrupted_again_and_again(tmp_path):
    whole = recoverable(curved(), target_loss, None)
    for _ in range(STEPS):
        with pytest.raises(KeyboardInterrupt):
            recoverable(curved(), Failing(1, interrupt), tmp_path / "c", steps=STEPS + 1)
    assert_same(recoverable(curved(), interrupt, tmp_path / "c"), whole)


def test_a_finished_run_is_read_back_and_can_be_prolonged(tmp_path):
    short = recoverable(curved(), target_loss, tmp_path / "c", steps=3)
    assert_same(recoverable(curved(), interrupt, tmp_path / "c", steps=3), short)
    prolonged = recoverable(curved(), target_loss, tmp_path / "c")
    assert_same(prolonged, recoverable(curved(), target_loss, None))


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_dropout_goes_on_with_the_same_random_numbers(tmp_path, memory):
    network = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.SiLU(), nn.Linear(16, 4))
    network = network.double().train()
    torch.manual_seed(5)
    whole = recoverable(lambda x, sigma: network(x), target_loss, None, memory=memory)
    assert len({step.loss for step in whole.history}) == STEPS
    torch.manual_seed(6)
    other = recoverable(lambda x, sigma: network(x), target_loss, None, memory=memory)
    assert numbers(other) != numbers(whole), "dropout must matter here"
    torch.manual_seed(5)
    loss = Failing(STOP, interrupt)
    with pytest.raises(KeyboardInterrupt):
        recoverable(lambda x, sigma: network(x), loss, tmp_path / "c", memory=memory)
    torch.manual_seed(999)
    resumed = recoverable(lambda x, sigma: network(x), target_loss, tmp_path / "c", memory=memory)
    assert_same(resumed, whole)


class Murder:
    """Kills the own process, which cannot catch it."""

    def __init__(self, at):
        self._left = at

    def __call__(self, *_):
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(where, path):
    """Runs in a child process: dies in a loss, or between writing and replacing the file."""
    torch.set_num_threads(1)
    if where == "loss":
        murder = Murder(STOP)
        recoverable(curved(), lambda x: (murder(), target_loss(x))[1], path)
    replace, murder = getattr(os, where), Murder(STOP)
    setattr(os, where, lambda *args: (murder(), replace(*args))[1])
    recoverable(curved(), target_loss, path)


@pytest.mark.parametrize("where", few(["loss", "replace"], "replace"))
def test_goes_on_after_kill_minus_nine(tmp_path, where):
    path = tmp_path / "run.ckpt"
    child = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import sys, test_optimize; test_optimize.run_until_killed(*sys.argv[1:])",
            where,
            str(path),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    rest = Failing(STEPS, interrupt)
    resumed = recoverable(curved(), rest, path)
    assert rest.count == STEPS - STOP
    assert_same(resumed, recoverable(curved(), target_loss, None))


class Plain(gs.noise.NoiseSource):
    """A user's own source: beside ``at`` it says what makes it the one it is."""

    def __init__(self, axis=-1):
        self.axis = axis

    def at(self, z0, step, num_steps):
        return z0.flip(self.axis)

    def identity(self):
        return {"axis": self.axis}


def test_a_run_with_a_source_of_the_user_s_own_can_be_resumed(tmp_path):
    """As in a second process, the source is another object of the same class."""
    whole = recoverable(curved(), target_loss, None, noise=Plain())
    interrupted(tmp_path / "c", noise=Plain())
    assert_same(recoverable(curved(), target_loss, tmp_path / "c", noise=Plain()), whole)


# ------------------------------------------------------------------ a save that fails


def torn(*args, **kwargs):
    """A disk that is full after half of the file."""
    content, file = args
    whole = io.BytesIO()
    SAVE(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    raise OSError(28, "No space left on device")


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


SAVE = torch.save


@pytest.mark.parametrize(
    ("owner", "name", "failure", "error"),
    [
        pytest.param(torch, "save", torn, OSError, id="torch fails"),
        pytest.param(torch, "save", interrupt, KeyboardInterrupt, id="ctrl-c while writing"),
        pytest.param(os, "fsync", refuse, OSError, id="fsync"),
        pytest.param(os, "replace", refuse, PermissionError, id="replace"),
    ],
)
def test_a_save_that_fails_leaves_the_old_checkpoint(
    tmp_path, monkeypatch, owner, name, failure, error
):
    path = tmp_path / "run.ckpt"
    interrupted(path)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failure)
        with pytest.raises(error):
            recoverable(curved(), target_loss, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    whole = recoverable(curved(), target_loss, None)
    assert_same(recoverable(curved(), target_loss, path), whole)


# ------------------------------------------------------------------ checkpoints that do not fit


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN = {
    "empty": b"",
    "zeros": bytes(64),
    "random bytes": bytes(normal(600, seed=1).mul(50).to(torch.int64).remainder(256).tolist()),
    "text starting with h": b"hello, this is a note\n",
    "text starting with a": b"a note\n",
    "text starting with r": b"r",
    "json": json.dumps({"history": []}).encode(),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(32),
    "pickle": pickle.dumps({"z0": [1.0, 2.0]}, protocol=2),
    "pickle of an object": pickle.dumps(Path("elsewhere"), protocol=2),
    "a tensor": saved(torch.zeros(3)),
    "a state dict": saved(nn.Linear(2, 2).state_dict()),
    "a state with a format of its own": saved({"format": "another/1", "state": {}}),
    "a list": saved([1, 2]),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_refuses_a_foreign_file(tmp_path, content):
    path, denoiser = tmp_path / "run.ckpt", Calls()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint must be ") as caught:
        recoverable(denoiser, target_loss, path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    assert denoiser.count == 0


@pytest.mark.parametrize("kept", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_refuses_a_truncated_file(tmp_path, kept):
    path, denoiser = tmp_path / "run.ckpt", Calls()
    interrupted(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    truncated = path.read_bytes()
    with pytest.raises(ValueError, match=r"^checkpoint must .*truncated") as caught:
        recoverable(denoiser, target_loss, path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == truncated
    assert denoiser.count == 0


class AnotherNoise(gs.noise.NoiseSource):
    def at(self, z0, step, num_steps):
        return z0.flip(1)

    def identity(self):
        return ()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("lr", 0.2),
        ("solver", "euler"),
        ("noise", gs.noise.SignedRoll(seed=3)),
        ("noise", gs.noise.SinCos()),
        ("noise", AnotherNoise()),
        ("churn", gs.Churn(2 * CHURN)),
        ("churn", gs.Churn(CHURN, s_noise=1.1)),
        ("prediction", "epsilon"),
        ("optimizer", torch.optim.RMSprop),
        ("maximize", True),
        ("grad_clip", 0.5),
        ("state_dtype", torch.float32),
        ("final_denoise", True),
        ("regularizer", gs.regularizers.ChiNorm(0.2)),
        ("regularizer", None),
    ],
    ids=lambda value: value if isinstance(value, (str, float, bool)) else None,
)
def test_refuses_the_checkpoint_of_another_run(tmp_path, name, other):
    path, denoiser = tmp_path / "run.ckpt", Calls()
    interrupted(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^checkpoint must be of this run .*{name}") as caught:
        recoverable(denoiser, target_loss, path, **{name: other})
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert denoiser.count == 0


@pytest.mark.parametrize(
    ("name", "z0", "levels"),
    [
        ("z0", start(seed=1), LEVELS),
        ("z0", start(dtype=torch.float32), LEVELS),
        ("z0", start().detach()[:2].requires_grad_(), LEVELS),
        ("z0", start().detach().view(3, 4, 2).requires_grad_(), LEVELS),
        ("sigmas", start(), LEVELS[:-1]),
        ("sigmas", start(), LEVELS * (1 + 1e-15)),
    ],
    ids=["values", "dtype", "batch", "shape", "fewer levels", "other levels"],
)
def test_refuses_the_checkpoint_of_another_start(tmp_path, name, z0, levels):
    path, denoiser = tmp_path / "run.ckpt", Calls(lambda x, sigma: 0.5 * x)
    gs.optimize(denoiser, start(), LEVELS, target_loss, steps=2, checkpoint=path)
    before, denoiser.count = path.read_bytes(), 0
    with pytest.raises(ValueError, match=f"^checkpoint must be of this run .*{name}"):
        gs.optimize(denoiser, z0, levels, target_loss, steps=3, checkpoint=path)
    assert path.read_bytes() == before
    assert denoiser.count == 0


def given(seed):
    return gs.noise.Given([normal(*SHAPE, seed=seed + k) for k in range(len(LEVELS) - 1)])


def test_refuses_the_checkpoint_of_other_given_tensors(tmp_path):
    interrupted(tmp_path / "c", noise=given(0))
    whole = recoverable(curved(), target_loss, None, noise=given(0))
    assert_same(recoverable(curved(), target_loss, tmp_path / "c", noise=given(0)), whole)
    with pytest.raises(ValueError, match=r"^checkpoint must be of this run .*noise"):
        recoverable(curved(), target_loss, tmp_path / "c", noise=given(50))


def test_refuses_the_checkpoint_of_other_conditioning(tmp_path):
    def shifted(x, sigma, shift):
        return curved()(x, sigma) + shift

    def run(loss, shift):
        cond = {"shift": torch.tensor(shift, dtype=torch.float64)}
        return recoverable(shifted, loss, tmp_path / "c", cond=cond)

    with pytest.raises(KeyboardInterrupt):
        run(Failing(STOP, interrupt), 0.1)
    with pytest.raises(ValueError, match=r"^checkpoint must be of this run .*cond"):
        run(target_loss, 0.2)


def test_names_a_checkpoint_without_a_folder(tmp_path):
    denoiser = Calls()
    with pytest.raises(ValueError, match=r"^checkpoint must lie in a folder .*nowhere"):
        recoverable(denoiser, target_loss, tmp_path / "nowhere" / "run.ckpt")
    assert denoiser.count == 0
    assert list(tmp_path.iterdir()) == []


def test_names_a_checkpoint_under_a_file(tmp_path):
    denoiser = Calls()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"^checkpoint must lie in a folder .*file"):
        recoverable(denoiser, target_loss, tmp_path / "file" / "run.ckpt")
    assert denoiser.count == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_names_a_folder_as_checkpoint(tmp_path):
    denoiser = Calls()
    with pytest.raises(ValueError, match=r"^checkpoint must be a file") as caught:
        recoverable(denoiser, target_loss, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert denoiser.count == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to the superuser")
def test_names_an_unwritable_folder(tmp_path):
    denoiser = Calls()
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ValueError, match=r"^checkpoint must lie in a folder .*writable"):
            recoverable(denoiser, target_loss, tmp_path / "run.ckpt")
    finally:
        tmp_path.chmod(0o755)
    assert denoiser.count == 0


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": -3}, "steps must be at least 1, got -3"),
        ({"steps": 2.0}, "steps must be an int, got float"),
        ({"steps": True}, "steps must be an int, got bool"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"lr": -0.1}, "lr must be positive, got -0.1"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"lr": math.inf}, "lr must be a finite number, got inf"),
        ({"lr": "0.1"}, "lr must be a real number, got str"),
        ({"grad_clip": 0.0}, "grad_clip must be positive, got 0.0"),
        ({"grad_clip": -1}, "grad_clip must be positive, got -1"),
        ({"grad_clip": math.nan}, "grad_clip must be a finite number, got nan"),
        ({"regularizer": 0.1}, "regularizer must be callable as regularizer"),
        ({"loss": torch.zeros(())}, "loss must be callable as loss"),
        ({"optimizer": "adam"}, "optimizer must "),
        ({"z0": torch.zeros(2, 3)}, "z0 must require grad, got requires_grad=False"),
        ({"z0": [0.0]}, "z0 must be a torch.Tensor, got list"),
        ({"z0": torch.zeros(3, requires_grad=True)}, "z0 must have shape"),
        ({"z0": torch.zeros(0, 3, requires_grad=True)}, "z0 must hold at least one element"),
        ({"sigmas": [1.0, 1.0]}, "sigmas must decrease strictly"),
        ({"sigmas": [1.0]}, "sigmas must have shape"),
        ({"sigmas": torch.tensor(1.0)}, "sigmas must have shape"),
        ({"sigmas": [1.0, math.nan]}, "sigmas must be finite"),
        ({"solver": "eulr"}, "solver must be one of .*did you mean 'euler'"),
        ({"memory": "chekpoint"}, "memory must be one of .*did you mean 'checkpoint'"),
        ({"checkpoint": 3.5}, "checkpoint must "),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("journal", [False, True], ids=["", "with a checkpoint"])
def test_refuses_before_any_denoiser_call(tmp_path, options, message, journal):
    denoiser = Calls()
    arguments = {"z0": start(), "sigmas": LEVELS, "loss": target_loss} | options
    if journal:
        arguments = {"checkpoint": tmp_path / "c"} | arguments
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        gs.optimize(denoiser, **arguments)
    assert denoiser.count == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_refuses_to_run_without_grad_mode(mode):
    denoiser, z0 = Calls(), start()
    with mode(), pytest.raises(ValueError, match=r"grad mode"):
        gs.optimize(denoiser, z0, LEVELS, target_loss)
    assert denoiser.count == 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: x.square().flatten(1).mean(1), r"loss.* must have shape \[\], got \[3\]"),
        (lambda x: x.mean().view(1), r"loss.* must have shape \[\], got \[1\]"),
        (lambda x: x.detach().mean(), "loss must depend on z0, got a value without gradient"),
        (lambda x: nn.Parameter(torch.ones(())) * 2, "loss must depend on z0, .*does not reach"),
        (lambda x: x.mean().item(), "loss.* must .*got float"),
        (lambda x: None, "loss.* must .*got NoneType"),
    ],
    ids=["one a sample", "shape 1", "detached", "independent of z0", "float", "None"],
)
def test_names_a_loss_that_does_not_fit(tmp_path, loss, message):
    interrupted(tmp_path / "c", regularizer=None)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        recoverable(curved(), loss, tmp_path / "c", regularizer=None)
    assert (tmp_path / "c").read_bytes() == before


@pytest.mark.parametrize(
    "regularizer",
    [lambda z: z.square().flatten(1).sum(1), lambda z: None],
    ids=["one a sample", "None"],
)
def test_names_a_regularizer_that_does_not_fit(regularizer):
    with pytest.raises((ValueError, TypeError), match=r"^regularizer.* must "):
        gs.optimize(curved(), start(), LEVELS, target_loss, regularizer=regularizer)


def test_a_regularizer_does_not_hide_a_loss_without_gradient():
    with pytest.raises(ValueError, match=r"^loss must depend on z0"):
        gs.optimize(
            curved(),
            start(),
            LEVELS,
            lambda x: x.detach().mean(),
            regularizer=gs.regularizers.ChiNorm(),
        )


def test_a_regularizer_may_give_a_number():
    plain = gs.optimize(curved(), start(), LEVELS, target_loss, steps=2)
    assert_same(
        gs.optimize(curved(), start(), LEVELS, target_loss, steps=2, regularizer=lambda z: 0.0),
        plain,
    )


# ------------------------------------------------------------------ what is not finite


def infinite_slope(x):
    """Finite, with an infinite derivative."""
    return target_loss(x) + (x - x.detach()).abs().sqrt().sum()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda x: target_loss(x) * math.nan, id="nan loss"),
        pytest.param(lambda x: target_loss(x) * math.inf, id="infinite loss"),
        pytest.param(infinite_slope, id="infinite gradient"),
    ],
)
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_stops_at_the_last_good_step(tmp_path, bad, memory):
    path, z0 = tmp_path / "run.ckpt", start()
    before = z0.detach().clone()
    with pytest.raises(gs.NonFiniteError):
        recoverable(curved(), Failing(STOP, bad), path, memory=memory)
    assert torch.equal(z0, before)
    kept = recoverable(curved(), interrupt, path, memory=memory, steps=STOP)
    assert_same(kept, recoverable(curved(), target_loss, None, memory=memory, steps=STOP))
    assert_same(
        recoverable(curved(), target_loss, path, memory=memory),
        recoverable(curved(), target_loss, None, memory=memory),
    )


def test_says_that_the_loss_is_not_finite():
    with pytest.raises(gs.NonFiniteError, match=r"loss .*step 2 must be finite, got loss nan"):
        recoverable(curved(), Failing(2, lambda x: target_loss(x) * math.nan), None)


def test_stops_at_a_regularizer_that_is_not_finite():
    with pytest.raises(gs.NonFiniteError, match="optimisation step 0 must be finite"):
        gs.optimize(
            curved(), start(), LEVELS, target_loss, regularizer=lambda z: z.sum() * math.nan
        )


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_names_step_and_level_of_a_denoiser_that_gives_nan(tmp_path, memory):
    level = LEVELS[2].item()

    def spoilt(x, sigma):
        return x * math.nan if abs(sigma[0] - level) < 1e-6 else 0.5 * x

    with pytest.raises(gs.NonFiniteError, match=rf"step 2 of 5 \(sigma = {level:.6g}\)"):
        gs.optimize(spoilt, start(), LEVELS, target_loss, memory=memory, checkpoint=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_can_be_told_not_to_look():
    loss = Failing(1, lambda x: target_loss(x) * math.nan)
    result = gs.optimize(curved(), start(), LEVELS, loss, steps=3, check_finite=False)
    assert math.isfinite(result.history[0].loss)
    assert math.isnan(result.history[2].loss)


def test_names_the_shape_that_a_denoiser_should_have_given(tmp_path):
    with pytest.raises(ValueError, match="denoiser"):
        recoverable(lambda x, sigma: x[:, :1], target_loss, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
