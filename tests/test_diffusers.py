# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines under each way, against plain autograd through the pipelines' own code."""

import inspect
import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from support.pipelines import BETAS, CASES, diffusers, leaves, stable_diffusion

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd

WAYS = ("program", "steps", "calls")
CHEAP = ("ddpm", "sd15", "flux")
EMBEDDED = ("flux", "lcm")  # upstream turns their guidance scale into a tensor without gradient


@pytest.fixture(autouse=True)
def _quiet_upstream():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")
        yield


def own(pipe, arguments):
    """The pipeline's latents by its own code, without the no_grad around it."""
    call = inspect.unwrap(type(pipe).__call__)
    if "latents" not in inspect.signature(call).parameters:
        return unconditional(pipe, **arguments)
    return call(pipe, **arguments, output_type="latent", return_dict=False)[0]


def unconditional(pipe, latents, num_inference_steps, generator, batch_size, **step):
    """The loop of DDPMPipeline and DDIMPipeline, which take no latents."""
    pipe.scheduler.set_timesteps(num_inference_steps)
    x = latents
    for t in pipe.scheduler.timesteps:
        output = pipe.unet(x, t).sample
        x = pipe.scheduler.step(output, t, x, generator=generator, **step).prev_sample
    return x


def apart(a, b):
    """Relative distance."""
    return float((a - b).detach().norm() / b.detach().norm())


def compare(gradients, wanted, limit):
    """Of each argument by itself, of the parameters together: some have a gradient of rounding."""
    parameters = {"ours": [], "theirs": []}
    for name, theirs in wanted.items():
        ours = gradients[name]
        assert (ours is None) == (theirs is None), name
        if theirs is None:
            continue
        if "." in name:
            parameters["ours"].append(ours.flatten())
            parameters["theirs"].append(theirs.flatten())
        else:
            assert apart(ours, theirs) < limit, name
    assert apart(torch.cat(parameters["ours"]), torch.cat(parameters["theirs"])) < limit


def gradients(x, named):
    found = torch.autograd.grad(x.square().mean(), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize(
    "name",
    [name if name in CHEAP else pytest.param(name, marks=pytest.mark.thorough) for name in CASES],
)
def test_a_pipeline_has_the_sample_and_the_gradients_of_its_own_code(name):
    case = CASES[name]
    pipe, arguments = case.build(), case.arguments()
    named = leaves(pipe, arguments)
    plain = dict(arguments)
    if name in EMBEDDED:
        plain["guidance_scale"] = named.pop("guidance_scale").item()
    sample = own(pipe, plain)
    wanted = gradients(sample, named)
    assert gsd.explain(pipe, **case.arguments()).method == case.method
    for way in WAYS:
        if way == "program" and case.method != "program":
            continue
        again = arguments | {"generator": case.arguments()["generator"]}
        x = gsd.pipeline(pipe, memory="checkpoint", method=way)(**again)
        assert x.shape == sample.shape
        assert x.dtype == sample.dtype
        if way == "program":
            assert apart(x, sample) < 1e-5
        else:
            assert torch.equal(x, sample)
        compare(gradients(x, named), wanted, 1e-5)
