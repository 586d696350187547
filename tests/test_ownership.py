# SPDX-License-Identifier: Apache-2.0
"""Large tensors are written over where nobody else holds them, and never where somebody does."""

import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch

import gradsampler as gs
from gradsampler.engine import cotangents, trajectory
from gradsampler.engine.ownership import large, written_over
from gradsampler.ops import native
from support.alive import no_collector
from support.runs import leaf
from support.strategies import STRATEGIES
from support.tiers import pairs

pytestmark = pytest.mark.skipif(native.available() is not None, reason="needs the extension")
SIGMAS = gs.schedules.karras(5, sigma_min=0.1, sigma_max=5.0)
SIZE = 2**18  # a MiB in float32

ARRAYS = (memoryview, np.ndarray)  # copied first: old NumPy's may be read alone
HOLDS = {
    "itself": lambda x: x,
    "view": lambda x: x[:, 3:9],
    "detached": lambda x: x.detach(),
    "reshaped": lambda x: x.view(2, -1),
    "numpy": lambda x: x.detach().numpy(),
    "memoryview": lambda x: memoryview(x.detach().numpy()),
    "storage": lambda x: x.untyped_storage(),
    "dlpack": lambda x: torch.utils.dlpack.to_dlpack(x.detach()),
    "numpy through dlpack": lambda x: np.from_dlpack(x.detach()),
    "closure": lambda x: lambda: x,
}


def noise(seed=0):
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(seed))


def values(held):
    """What is in the memory that something holds."""
    if callable(held):
        held = held()
    if isinstance(held, torch.UntypedStorage):
        return torch.tensor([], dtype=torch.float32).set_(held).clone()
    if type(held).__name__ == "PyCapsule":
        return torch.utils.dlpack.from_dlpack(held).clone()
    return torch.as_tensor(np.array(held) if isinstance(held, ARRAYS) else held).clone()


@pytest.fixture
def anew(monkeypatch):
    """A function that has runs make all tensors anew, or not."""

    def switch(off):
        for module in (trajectory, cotangents):
            monkeypatch.setattr(module, "large", (lambda x: False) if off else large)

    return switch


@pytest.mark.parametrize("name", HOLDS)
def test_what_is_held_is_not_written_over(name):
    table = {"x": noise()}
    held = HOLDS[name](table["x"])
    assert written_over(table, "x") is None
    del held
    before = table["x"].data_ptr()
    found = written_over(table, "x")
    assert found.data_ptr() == before
    assert found is not table["x"]


def test_what_autograd_saved_is_not_written_over():
    table, weight = {"x": noise()}, leaf(torch.ones(1))
    y = weight * table["x"]
    assert written_over(table, "x") is None
    del y
    assert written_over(table, "x") is not None


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3), torch.zeros(2, SIZE).mT, torch.zeros(SIZE, requires_grad=True)],
    ids=["small", "strided", "leaf"],
)
def test_what_is_not_the_runs_to_write(x):
    table = [x.detach() if not x.requires_grad else x]
    del x
    assert written_over(table, 0) is None


def test_a_weak_reference_never_sees_another_state():
    table = {"x": noise()}
    reference = weakref.ref(table["x"])
    found = written_over(table, "x")
    table["x"] = found
    assert reference() is None


def test_the_states_of_a_run_lie_in_one_place():
    places = []

    def denoiser(x, sigma):
        places.append(x.data_ptr())
        return 0.5 * x

    with torch.no_grad(), no_collector():
        gs.sample(denoiser, noise(), SIGMAS)
        assert len(set(places)) == 1
        places.clear()
        gs.sample(gs.EDM(denoiser), noise(), SIGMAS)
        assert len(set(places)) == 1


WAYS = {
    "plain": {},
    "multistep": {"solver": "dpmpp_2m"},
    "heun": {"solver": "heun"},
    "rolled": {"churn": gs.Churn(3.0), "noise": gs.noise.SignedRoll()},
    "sincos": {"churn": gs.Churn(3.0), "noise": gs.noise.SinCos()},
    "two noises": {"solver": "seeds_2", "noise": gs.noise.Philox()},
}


@pairs(cheap={"way": ["plain"]}, way=WAYS, hold=HOLDS, scaled=[False, True])
def test_what_a_denoiser_keeps_of_its_input_stays(way, hold, scaled):
    kept, copies = [], []

    def denoiser(x, sigma):
        kept.append(HOLDS[hold](x))
        copies.append(x.clone())
        return 0.5 * x

    model = gs.EDM(denoiser) if scaled else denoiser
    with torch.no_grad():
        x = gs.sample(model, noise(), SIGMAS, **WAYS[way])
        after = x.clone()
        gs.sample(model, noise(1), SIGMAS, **WAYS[way])
    assert torch.equal(x, after)
    for held, copy in zip(kept, copies, strict=True):
        found = values(held)
        within = copy[:, 3:9] if hold == "view" else copy
        assert torch.equal(found.flatten(), within.flatten())


OUTPUTS = {
    "a new one": lambda x, buffer: torch.tanh(x),
    "its input": lambda x, buffer: x,
    "a view of its input": lambda x, buffer: x.view(-1).view(x.shape),
    "a buffer of its own": lambda x, buffer: torch.tanh(x, out=buffer),
    "a constant": lambda x, buffer: buffer,
}


@pairs(cheap={"way": ["plain", "multistep"]}, way=WAYS, output=OUTPUTS, scaled=[False, True])
def test_the_sample_is_that_of_tensors_made_anew(way, output, scaled, anew):
    buffer, found = torch.ones(1, SIZE), []

    def denoiser(x, sigma):
        return OUTPUTS[output](x, buffer)

    for off in (True, False):
        anew(off)
        buffer.fill_(1.0)
        z0 = noise()
        with torch.no_grad():
            model = gs.EDM(denoiser) if scaled else denoiser
            found.append(gs.sample(model, z0, SIGMAS, **WAYS[way]))
        assert torch.equal(z0, noise())
    assert torch.equal(*found)


def test_what_a_callback_keeps_stays():
    infos, copies = [], []

    def callback(info):
        infos.append(info)
        copies.append((info.x.clone(), info.denoised.clone()))

    with torch.no_grad():
        gs.sample(lambda x, sigma: 0.5 * x, noise(), SIGMAS, callback=callback)
    for info, (x, denoised) in zip(infos, copies, strict=True):
        assert torch.equal(info.x, x)
        assert torch.equal(info.denoised, denoised)


def test_start_stays_as_it_is():
    start, z0 = noise(1), noise()
    with torch.no_grad():
        gs.sample(lambda x, sigma: 0.5 * x, z0, SIGMAS, start=start, churn=gs.Churn(3.0))
    assert torch.equal(start, noise(1))
    assert torch.equal(z0, noise())


class Keeping(torch.autograd.Function):
    """A network whose backward keeps the cotangents that it is given, and those that it returns."""

    kept: ClassVar[list] = []  # emptied by each test
    returned = None  # what it returns in place of a new tensor

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        dx = g * (1 - torch.tanh(x) ** 2)
        if Keeping.returned is not None:
            dx = Keeping.returned.copy_(dx)
        Keeping.kept += [(g, g.clone()), (g[:, :5], g[:, :5].clone())]
        if Keeping.returned is None:
            Keeping.kept.append((dx, dx.clone()))
        return dx


@pairs(
    cheap={"memory": ["checkpoint"], "way": ["plain"]},
    way=WAYS,
    memory=[name for name in STRATEGIES if name != "store"],
    own=[False, True],
)
def test_what_a_backward_keeps_stays(way, memory, own, anew, tmp_path):
    found, z0, shift = [], leaf(noise()), leaf(torch.tensor([0.1]))
    for off in (True, False):
        anew(off)
        Keeping.kept.clear()
        Keeping.returned = torch.empty(1, SIZE) if own else None
        options = {"memory": STRATEGIES[memory](tmp_path), **WAYS[way]}
        x = gs.sample(lambda x, sigma: Keeping.apply(x) + shift, z0, SIGMAS, **options)
        lam = noise(3)
        gradients = torch.autograd.grad(x, [z0, shift], lam, retain_graph=True)
        found.append(gradients)
        assert torch.equal(lam, noise(3))
        for held, copy in Keeping.kept:
            assert torch.equal(held, copy)
        again = torch.autograd.grad(x, [z0, shift], lam)
        for g, h in zip(gradients, again, strict=True):
            assert torch.equal(g, h)
    Keeping.kept.clear()
    Keeping.returned = None
    for g, h in zip(*found, strict=True):
        assert torch.equal(g, h)


def test_a_bias_that_receives_the_cotangent_itself(anew):
    # Its gradient at each call is the cotangent of the output, as it is.
    found, z0, bias = [], leaf(noise()), leaf(noise(1))
    for off in (True, False):
        anew(off)
        x = gs.sample(lambda x, sigma: torch.tanh(x) + bias, z0, SIGMAS, memory="checkpoint")
        found.append(torch.autograd.grad(x.square().sum(), [z0, bias]))
    for g, h in zip(*found, strict=True):
        assert torch.equal(g, h)


def test_a_monitor_sees_the_same(anew):
    found = []
    for off in (True, False):
        anew(off)
        monitor = gs.Monitor()
        x = gs.sample(halved, leaf(noise()), SIGMAS, memory="checkpoint", monitor=monitor)
        x.square().sum().backward()
        found.append(list(map(str, monitor.calls)))  # NaN is none of a number
    assert found[0] == found[1]


def halved(x, sigma):
    return 0.5 * x.sin()


def test_the_cotangents_of_a_run_lie_in_one_place():
    places = []

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 0.5 * x

        @staticmethod
        def backward(ctx, g):
            places.append(g.data_ptr())
            return 0.5 * g

    with no_collector():
        x = gs.sample(lambda x, s: Looking.apply(x), leaf(noise()), SIGMAS, memory="checkpoint")
        x.square().sum().backward()
    assert len(places) == 5
    assert len(set(places)) == 1
