# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of an optimisation: whose it is, that no bit of it changed, and full disks."""

import errno
import functools
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.optimization.identity import Identity
from gradsampler.optimization.journal import Journal
from support.problems import normal

LEVELS = gs.schedules.karras(3, sigma_min=0.1, sigma_max=6.0)
SHAPE = (2, 1, 6)
MESSAGE = r"^checkpoint must be of this run with "


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed=0, *, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(1))
    return nn.Sequential(*layers).double()


def optimize(denoiser, checkpoint, *, steps=2, loss=None, **options):
    return gs.optimize(
        denoiser,
        normal(*SHAPE).requires_grad_(),
        LEVELS,
        loss or (lambda x: (x - 1).square().mean()),
        steps=steps,
        checkpoint=checkpoint,
        **options,
    )


def refused(path, denoiser, **options):
    """The message of a run that must not go on from the file, which calls no denoiser."""
    before, calls = path.read_bytes(), []
    hooks = [nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))]
    try:
        with pytest.raises(ValueError, match=MESSAGE) as caught:
            optimize(denoiser, path, **options)
    finally:
        hooks[0].remove()
    assert calls == []
    assert path.read_bytes() == before
    return str(caught.value)


# ------------------------------------------------------------------ the denoiser of another run


def in_closure(net):
    return lambda x, sigma: net(x)


def in_partial(net):
    return functools.partial(lambda net, x, sigma: net(x), net)


GLOBAL = nn.Identity()


def through_global(net):
    global GLOBAL
    GLOBAL = net
    return lambda x, sigma: GLOBAL(x)


class Wrapped:
    """A denoiser as users write one: an object with a network among its attributes."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x, sigma):
        return self.net(x)


HIDDEN = {
    "closure": in_closure,
    "partial": in_partial,
    "global": through_global,
    "object": Wrapped,
    "method": lambda net: Wrapped(net).__call__,
    "in a Parameterization": lambda net: gs.EDM(lambda x, noise: net(x)),
    "guided": lambda net: gs.Guided(in_closure(net), 2.0, {}),
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_changed_weights_and_buffers_are_named(tmp_path, hide):
    path = tmp_path / "c"
    net = network()
    net.register_buffer("table", torch.zeros(4))
    optimize(hide(net), path)
    same = network()
    same.register_buffer("table", torch.zeros(4))
    optimize(hide(same), path)
    with torch.no_grad():
        same[2].weight[0, 0] += 1e-12
    message = refused(path, hide(same))
    assert re.search(r"denoiser\S*\.2\.weight torch.float64 \[6, 8\] \w{16}, got ", message)
    same = network()
    same.register_buffer("table", torch.tensor([0.0, 0.0, 0.0, -0.0]))
    assert re.search(r"denoiser\S*\.table torch.float32 \[4\]", refused(path, hide(same)))


def given(net=None, **changes):
    """A network of pairs of settings, by name: the one that wrote the file, and another."""
    return net or network(), changes


BETAS = gs.schedules.betas("linear", 50)
ALPHAS = torch.cumprod(1 - torch.as_tensor(BETAS), 0)


def plain(factor):
    return lambda x, sigma: factor * x


def one(x, sigma):
    return 0.5 * x


def other(x, sigma):
    return 0.25 * x


def told(x, noise, label=0):
    return x * 0.1


@dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, x, sigma):
        return self.factor * x


class Keeps:
    def __init__(self, **values):
        self.__dict__.update(values)

    def __call__(self, x, sigma):
        return 0.5 * x


PAIRS = {
    "sigma_data": (
        gs.EDM(told, sigma_data=0.5),
        gs.EDM(told, sigma_data=0.6),
        "denoiser.sigma_data 0.6",
        "denoiser.sigma_data 0.5",
    ),
    "VP's table": (gs.VP(told, ALPHAS), gs.VP(told, ALPHAS**2), "denoiser.log_sigmas ", ""),
    "VP's prediction": (gs.VP(told, ALPHAS), gs.VP(told, ALPHAS, "v"), "denoiser.prediction v", ""),
    "guidance scale": (
        gs.Guided(told, 2.0, {"label": 1}),
        gs.Guided(told, 3.0, {"label": 1}),
        "denoiser.scale 3.0",
        "denoiser.scale 2.0",
    ),
    "a scale as a tensor": (
        gs.Guided(told, torch.tensor(2.0), {}),
        gs.Guided(told, torch.tensor(3.0), {}),
        "denoiser.scale torch.float64",
        "",
    ),
    "unconditional": (
        gs.Guided(told, 2.0, {"label": 1}),
        gs.Guided(told, 2.0, {"label": 2}),
        "denoiser.unconditional.label 2",
        "denoiser.unconditional.label 1",
    ),
    "wrapper": (gs.Flow(told), gs.EDM(told), "denoiser gradsampler.parameterization.EDM", "Flow"),
    "function": (one, other, "denoiser other", "denoiser one"),
    "number in a closure": (plain(0.5), plain(0.75), "denoiser.factor 0.75", "denoiser.factor 0.5"),
    "code": (lambda x, sigma: 0.5 * x, lambda x, sigma: x - x * 0.5, "denoiser ", ""),
    "constant": (lambda x, sigma: 0.5 * x, lambda x, sigma: 0.6 * x, "denoiser ", ""),
    "dataclass": (Scaled(0.5), Scaled(0.6), "denoiser.factor 0.6", "denoiser.factor 0.5"),
    "attribute": (Keeps(a=[1, {"b": 2}]), Keeps(a=[1, {"b": 3}]), "denoiser.a[1].b 3", ".b 2"),
    "one attribute more": (Keeps(), Keeps(k=1), "denoiser.k 1", "denoiser.k absent"),
    "default": (
        lambda x, sigma, k=0.5: k * x,
        lambda x, sigma, k=0.25: k * x,
        "denoiser()[0] 0.25",
        "denoiser()[0] 0.5",
    ),
    "array": (
        Keeps(a=torch.zeros(2).numpy()),
        Keeps(a=torch.ones(2).numpy()),
        "denoiser.a float32 [2]",
        "",
    ),
    "dropout": (nn.Dropout(0.1).eval(), nn.Dropout(0.2).eval(), "denoiser Ignoring ", ""),
}


class Ignoring(nn.Module):
    """Calls a module with the state alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma):
        return self.inner(x)


@pytest.mark.parametrize(("first", "second", "now", "was"), PAIRS.values(), ids=PAIRS)
def test_another_denoiser_is_refused_with_what_differs(tmp_path, first, second, now, was):
    path = tmp_path / "c"
    if isinstance(first, nn.Module):
        first, second = Ignoring(first), Ignoring(second)
    cond = {"cond": {"label": 0}} if isinstance(first, gs.Guided) and was else {}
    optimize(first, path, **cond)
    message = refused(path, second, **cond)
    expected, got = message.split(", got ")
    assert now in expected
    assert was in got
    optimize(first, path, **cond)


@pytest.mark.parametrize("switch", [nn.Module.eval, nn.Module.train])
def test_the_mode_of_a_network_counts(tmp_path, switch):
    net = Ignoring(nn.Sequential(network(), nn.Dropout(0.5)))
    optimize(switch(net), tmp_path / "c")
    switch(net).train(not net.training)
    assert "denoiser Ignoring " in refused(tmp_path / "c", net)


def sgd(**settings):
    return lambda parameters, lr: torch.optim.SGD(parameters, lr, **settings)


@pytest.mark.parametrize(
    ("first", "second", "now", "was"),
    [
        (sgd(momentum=0.9), sgd(momentum=0.8), "optimizer.momentum 0.8", "optimizer.momentum 0.9"),
        (sgd(), sgd(weight_decay=0.1), "optimizer.weight_decay 0.1", "optimizer.weight_decay 0"),
        (
            torch.optim.Adam,
            lambda p, lr: torch.optim.Adam(p, lr, betas=(0.9, 0.99)),
            "optimizer.betas[1] 0.99,",
            "optimizer.betas[1] 0.999",
        ),
        (sgd(), torch.optim.RMSprop, "optimizer.alpha 0.99", "optimizer.alpha absent"),
    ],
    ids=["momentum", "weight decay", "betas", "type"],
)
def test_other_settings_of_the_optimizer_are_refused(tmp_path, first, second, now, was):
    optimize(one, tmp_path / "c", optimizer=first)
    expected, got = (refused(tmp_path / "c", one, optimizer=second) + ",").split(", got ")
    assert now in f"{expected},"
    assert was in got


@pytest.mark.parametrize(
    ("first", "second"),
    [({"solver": "heun"}, {}), ({}, {"solver": "heun"}), ({"cond": {"k": 1}}, {"cond": {}})],
)
def test_what_only_one_of_the_runs_gives_is_compared(tmp_path, first, second):
    def denoiser(x, sigma, k=0):
        return 0.5 * x

    optimize(denoiser, tmp_path / "c", **first)
    assert next(iter({**first, **second})) in refused(tmp_path / "c", denoiser, **second)
    optimize(denoiser, tmp_path / "c", **first)


def test_a_default_that_is_spelt_out_is_the_default(tmp_path):
    optimize(one, tmp_path / "c", solver="euler", check_finite=False)
    optimize(one, tmp_path / "c", prediction="x0", progress=True)


# ------------------------------------------------------------------ sources of the user's own


class Nameless(gs.noise.NoiseSource):
    def __init__(self, axis):
        self.axis = axis

    def at(self, z0, step, num_steps):
        return z0.flip(self.axis)


class Named(Nameless):
    def identity(self):
        return {"axis": self.axis}


class Tupled(Nameless):
    def identity(self):
        return (self.axis, torch.tensor(self.axis))


@dataclass(frozen=True)
class Data(gs.noise.NoiseSource):
    axis: int

    def at(self, z0, step, num_steps):
        return z0.flip(self.axis)


class More(gs.noise.SignedRoll):
    """Is a dataclass by what it inherits, and has more in it than its fields."""

    def __init__(self, axis):
        super().__init__(0)
        object.__setattr__(self, "axis", axis)


@pytest.mark.parametrize("make", [Named, Tupled, Data], ids=lambda kind: kind.__name__)
def test_a_source_is_told_by_its_identity(tmp_path, make):
    def run(axis, wrap=lambda source: source):
        return {"noise": wrap(make(axis)), "churn": gs.Churn(1.0)}

    optimize(one, tmp_path / "c", **run(1))
    optimize(one, tmp_path / "c", **run(1))
    assert "noise" in refused(tmp_path / "c", one, **run(2))
    optimize(one, tmp_path / "d", **run(1, lambda source: gs.noise.Mixture(source, 0.5)))
    mixed = run(2, lambda source: gs.noise.Mixture(source, 0.5))
    assert "noise.other" in refused(tmp_path / "d", one, **mixed)


@pytest.mark.parametrize("make", [Nameless, More], ids=lambda kind: kind.__name__)
def test_a_source_without_identity_is_told_what_to_write(tmp_path, make):
    calls = []
    expected = rf'noise must have a method identity\(\) .*"seed": self.seed.*, got {make.__name__}$'
    with pytest.raises(TypeError, match=expected):
        optimize(
            lambda x, sigma: calls.append(1) or 0.5 * x,
            tmp_path / "c",
            noise=make(1),
            churn=gs.Churn(1.0),
        )
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_no_identity_is_needed():
    optimize(one, None, noise=Nameless(1), churn=gs.Churn(1.0))


# ------------------------------------------------------------------ what the user says


def test_the_user_can_say_that_it_is_the_same(tmp_path):
    """Also as the only way on for a denoiser that differs in each process."""
    path = tmp_path / "c"
    optimize(Keeps(born=0.1), path)
    message = refused(path, Keeps(born=0.2))
    (said,) = re.findall(r"say so by identity=\{'denoiser': '(\w{16})'\}", message)
    optimize(Keeps(born=0.2), path, steps=3, identity={"denoiser": said})
    optimize(Keeps(born=0.1), path, steps=4)
    assert "denoiser" in refused(path, Keeps(born=0.2), identity={"denoiser": said[::-1]})


def test_a_name_stands_for_what_would_be_seen(tmp_path):
    path = tmp_path / "c"
    optimize(Keeps(born=0.1), path, identity={"denoiser": "mine", "loss": "target"})
    optimize(Keeps(born=0.2), path, identity={"denoiser": "mine", "loss": "target"})
    message = refused(path, Keeps(), identity={"denoiser": "mine", "loss": "reward"})
    assert "loss reward, got " in message
    assert "loss target" in message
    assert "loss absent" in refused(path, Keeps(), identity={"denoiser": "mine"})


def test_many_differences_are_counted(tmp_path):
    optimize(Keeps(**{f"k{i}": i for i in range(9)}), tmp_path / "c")
    message = refused(tmp_path / "c", Keeps(**{f"k{i}": i + 1 for i in range(9)}))
    assert "denoiser.k4 5 and 4 more, got " in message


SCRIPT = """
import test_journal as t
net = t.network()
print(t.all_lines(t.in_closure(net), t.Wrapped(net), t.gs.EDM(t.told)))
"""


def all_lines(*values):
    return [sorted(Identity(value).lines.items()) for value in (*values, settled)]


def settled(x, sigma):
    return x if sigma.dtype in {torch.float64, torch.float32} and "a" in {"a", "b", "c"} else -x


@pytest.mark.thorough
def test_an_identity_is_the_same_in_another_process():
    def python(seed):
        path = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-P", "-c", SCRIPT],
            env=os.environ | path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    net = network()
    here = f"{all_lines(in_closure(net), Wrapped(net), gs.EDM(told))}\n"
    assert python("1") == python("2") == here


def test_tensors_of_every_kind_have_an_identity():
    x = normal(3, 4)
    kinds = [
        x,
        x.float(),
        x.bfloat16(),
        x.to(torch.float8_e4m3fn),
        x.to(torch.complex128),
        (x + 1j).conj(),
        torch._neg_view(x),
        x.t(),
        x[:, ::2],
        x[0, 0],
        x > 0,
        x.to_sparse(),
        x.to("meta"),
        torch.empty(0),
        nn.Parameter(x),
        torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged),
    ]
    with torch.inference_mode():
        kinds.append(x + 1)
    texts = [Identity(each).lines[""] for each in kinds]
    assert texts == [Identity(each.clone()).lines[""] for each in kinds]
    assert len({*texts}) == len(kinds) - 2, "a parameter and its values have one, so has sparse"


# ------------------------------------------------------------------ what a run changes and draws


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_running_statistics_go_on_where_they_stood(tmp_path, memory):
    def run(net, checkpoint, steps=5):
        return optimize(in_closure(net), checkpoint, steps=steps, memory=memory)

    whole_net, net = network(norm=True), network(norm=True)
    whole = run(whole_net, None)
    run(net, tmp_path / "c", steps=2)
    resumed = run(network(norm=True), tmp_path / "c")
    assert [step[:3] for step in resumed.history] == [step[:3] for step in whole.history]
    again = run(net, tmp_path / "c")  # in one process: the statistics have moved meanwhile
    assert torch.equal(again.z0, whole.z0)
    assert not torch.equal(net[1].running_mean, torch.zeros(1))


def test_a_generator_goes_on_where_it_stood(tmp_path):
    def denoiser(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda x, sigma: 0.5 * x + 0.1 * torch.randn(SHAPE, generator=generator).double()

    whole = optimize(denoiser(3), None, steps=5)
    optimize(denoiser(3), tmp_path / "c", steps=2)
    assert torch.equal(optimize(denoiser(3), tmp_path / "c", steps=5).z0, whole.z0)


# ------------------------------------------------------------------ single bits


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_flipped_bit_is_one_clear_error(tmp_path):
    path = tmp_path / "c"
    whole = optimize(one, path, steps=3)
    good = path.read_bytes()
    head = range(8 * 64)  # the format and the checksum: all of it
    some = random.Random(0).sample(range(len(head), 8 * len(good)), 300)
    for bit in (*head, *some, 8 * len(good) - 1):
        path.write_bytes(flipped(good, bit))
        with pytest.raises(ValueError, match=r"^checkpoint must be an optimisation check") as got:
            Journal(path, {}).load()
        assert f"{path}, whose {len(good)} bytes are truncated, damaged" in str(got.value)
    for bit in random.Random(1).sample(range(8 * len(good)), 10):
        path.write_bytes(flipped(good, bit))
        with pytest.raises(ValueError, match=r"^checkpoint must be an optimisation checkpoint"):
            optimize(one, path, steps=3)
    path.write_bytes(good)
    assert torch.equal(optimize(one, path, steps=3).z0, whole.z0)


# ------------------------------------------------------------------ disks that are full


def test_a_full_disk_names_the_file_and_the_bytes(tmp_path, monkeypatch):
    """/dev/full in place of the new file: a write to it ends as one to a full disk."""
    path = tmp_path / "run.ckpt"

    def full(prefix, dir):
        left = Path(dir) / f"{prefix}new"
        left.touch()
        return os.open("/dev/full", os.O_WRONLY), str(left)

    optimize(one, path)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.mkstemp", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            optimize(one, path, steps=4)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        (size,) = re.findall(r"checkpoint: (\d+) bytes could not be written", str(caught.value))
        assert 0.9 * len(before) < int(size) < 2 * len(before)
        assert "is still that of the step before" in str(caught.value)
        with pytest.raises(OSError, match="the file is not there"):
            optimize(one, tmp_path / "new")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["run.ckpt"]
    assert torch.equal(optimize(one, path, steps=4).z0, optimize(one, None, steps=4).z0)


TOO_LARGE = """
import resource, signal, sys, test_journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
test_journal.optimize(test_journal.one, sys.argv[1], steps=4)
"""


@pytest.mark.thorough
def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.ckpt"
    optimize(one, path)
    before = path.read_bytes()
    child = subprocess.run(
        [sys.executable, "-P", "-c", TOO_LARGE, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "bytes could not be written" in child.stderr
    assert f"File too large: '{path}'" in child.stderr
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["run.ckpt"]
