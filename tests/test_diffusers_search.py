# SPDX-License-Identifier: Apache-2.0
"""Noise optimisation of pipelines."""

import numpy as np
import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from support.pipelines import CASES, apart, own, stable_diffusion
from support.tiers import few

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def call(pipe, **more):
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 1, 5, 8, generator=generator)
    arguments = {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "lr": 0.1,
        "progress": False,
    }
    return gsd.optimize(pipe, red, **(arguments | more))


@pytest.mark.parametrize("name", few(CASES, "ddpm", "flux"))
def test_the_noise_that_a_call_begins_with_is_found(name):
    """As latents it gives the same run."""
    case = CASES[name]
    pipe, arguments = case.build(), case.arguments()
    shape = arguments.pop("latents").shape
    before = arguments["generator"].get_state()
    noise = gsd.start(pipe, **arguments)
    assert noise.shape == shape
    assert abs(float(noise.square().mean()) - 1) < 0.5
    arguments["generator"].set_state(before)
    drawn = gsd.pipeline(pipe, method="calls")(**arguments)
    arguments["generator"].set_state(before)
    again = arguments["generator"]
    torch.randn(noise.shape, generator=again)  # what the pipeline draws for its latents
    given = gsd.pipeline(pipe, method="calls")(**arguments, latents=noise)
    assert apart(given, drawn) < 1e-5


def test_a_reward_rises():
    pipe = stable_diffusion()
    found = call(pipe, steps=4, regularizer=gs.regularizers.ChiNorm(0.01))
    values = [step.loss for step in found.history]
    assert len(values) == 4
    assert values == sorted(values)
    assert found.sample.shape == (1, 3, 16, 16)
    assert found.sample.min() >= 0
    assert found.sample.max() <= 1
    assert red(found.sample) > values[0]
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.thorough
def test_the_first_update_is_that_of_plain_autograd():
    pipe = stable_diffusion()
    case = CASES["sd15"]
    arguments = case.arguments()
    latents = arguments.pop("latents")
    found = gsd.optimize(
        pipe,
        red,
        latents=latents.detach(),
        steps=1,
        lr=0.5,
        optimizer=torch.optim.SGD,
        progress=False,
        **{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()},
    )
    sample = own(pipe, case.arguments() | {"latents": latents})
    image = (pipe.vae.decode(sample / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    (gradient,) = torch.autograd.grad(red(image).mean(), latents)
    assert found.history[0].loss == pytest.approx(red(image).mean().item(), rel=1e-5)
    assert apart(found.z0 - latents.detach(), 0.5 * gradient) < 1e-4


@pytest.mark.thorough
def test_a_stochastic_pipeline_draws_the_same_in_each_run():
    pipe = stable_diffusion()
    first = call(pipe, steps=1, eta=1.0)
    longer = call(pipe, steps=2, eta=1.0, lr=1e-9)
    assert longer.history[1].loss == pytest.approx(longer.history[0].loss, abs=1e-6)
    assert first.history[0].loss == longer.history[0].loss


@pytest.mark.thorough
def test_an_interrupted_search_goes_on_to_the_same_bits(tmp_path):
    whole = call(stable_diffusion(), steps=4, checkpoint=tmp_path / "whole")
    call(stable_diffusion(), steps=2, checkpoint=tmp_path / "part")
    resumed = call(stable_diffusion(), steps=4, checkpoint=tmp_path / "part")
    assert torch.equal(whole.z0, resumed.z0)
    assert [s.loss for s in whole.history] == [s.loss for s in resumed.history]
    with pytest.raises(ValueError, match="num_inference_steps"):
        call(stable_diffusion(), steps=4, num_inference_steps=5, checkpoint=tmp_path / "part")


@pytest.mark.thorough
def test_pictures_are_written(tmp_path):
    from PIL import Image

    pipe, z0 = stable_diffusion(), torch.randn(2, 4, 8, 8)
    embeds = torch.randn(2, 2, 5, 8)
    prompts = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    folder = tmp_path / "pictures"
    call(pipe, steps=3, pictures=folder, every=2, latents=z0, **prompts)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-0000.png", "step-0002.png"]
    with Image.open(folder / "step-0000.png") as image:
        pixels = np.asarray(image) / 255
    run = gsd.pipeline(pipe)
    first = run(**prompts, latents=z0, num_inference_steps=3, guidance_scale=3.0, output_type="pt")
    side_by_side = np.concatenate(list(first.detach().permute(0, 2, 3, 1).numpy()), axis=1)
    assert np.abs(pixels - side_by_side).max() < 1 / 255


def test_arguments_that_do_not_fit_are_named(tmp_path):
    pipe = stable_diffusion()
    with pytest.raises(ValueError, match="every must be at least 1"):
        call(pipe, every=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        call(pipe, steps=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="pictures must be a folder"):
        call(pipe, pictures=tmp_path / "file")
