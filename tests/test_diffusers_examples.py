# SPDX-License-Identifier: Apache-2.0
"""The published methods of examples/, in short forms."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from support.tiers import few

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture
def example(monkeypatch):
    """Imports a script of the folder."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.mark.thorough
def test_reno_raises_the_sum_of_rewards(example):
    found = example("reno").search(steps=6)
    assert found.scores[-1] > found.scores[0] + 1
    assert found.after.mean() > found.before.mean() + 0.01


@pytest.mark.thorough
def test_doodl_stays_on_the_sphere(example):
    found = example("doodl").search(updates=5, steps=12)
    assert found.scores[-1] > found.scores[0] + 0.5
    energy = found.noise.square().mean((1, 2, 3))
    assert torch.allclose(energy, torch.ones(10), rtol=1e-5)


@pytest.mark.thorough
def test_d_flow_agrees_with_what_is_known(example):
    module = example("d_flow")
    found = module.search(iterations=2, steps=4)
    known = (..., slice(module.ROWS), slice(None))
    first, last = ((x - found.picture)[known].square().mean() for x in (found.before, found.after))
    assert last < 0.2 * first
    assert found.losses[-1] < found.losses[0]


def test_draft_trains_lora_weights_by_the_last_steps(example):
    pytest.importorskip("peft")
    found = example("draft").train(updates=8, last=1, steps=3, batch=16)
    assert sum(found.scores[-3:]) > sum(found.scores[:3]) + 1
    assert not torch.equal(found.before, found.after)


@pytest.mark.thorough
def test_the_gradient_of_draft_is_that_of_the_last_steps(example):
    """Against plain autograd from the state before them."""
    gsd = importlib.import_module("gradsampler.integrations.diffusers")
    peft = pytest.importorskip("peft")
    label, z = torch.arange(4), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = gsd.digits()
    torch.manual_seed(0)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["inlet", "outlet"]),
        pipe.denoiser.network,
    )
    learned = [p for p in pipe.denoiser.parameters() if p.requires_grad]
    run = gsd.pipeline(pipe, memory="truncated:2")
    x = run(label, 6, latents=z, output_type="latent")
    ours = torch.autograd.grad(x.square().mean(), learned)
    scheduler, state = pipe.scheduler, z
    scheduler.set_timesteps(6)
    for k, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(k >= 4):
            state = scheduler.step(pipe.denoiser(state, t, label), t, state).prev_sample
    wanted = torch.autograd.grad(state.square().mean(), learned)
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("name", few(["reno", "doodl", "d_flow", "draft"], "draft"))
def test_each_writes_its_picture(example, name, tmp_path, monkeypatch, capsys):
    module = example(name)
    path = tmp_path / "out.png"
    count = {"doodl": "--updates", "draft": "--updates", "d_flow": "--iterations"}
    monkeypatch.setattr(sys, "argv", [name, "--out", str(path), count.get(name, "--steps"), "1"])
    module.main()
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "->" in capsys.readouterr().out
    assert (PICTURES / f"{name.replace('_', '-')}.png").exists()
