# SPDX-License-Identifier: Apache-2.0
"""Gradients through diffusers pipelines, conventionally imported as ``gsd``.

import gradsampler.integrations.diffusers as gsd

run = gsd.pipeline(pipe)
latents = run(prompt_embeds=embeds, latents=z, guidance_scale=s, num_inference_steps=30)
"""

import importlib.util

if importlib.util.find_spec("diffusers") is None:
    raise ImportError(
        "gradsampler.integrations.diffusers must find the package diffusers; "
        'install it with pip install "gradsampler[diffusers]"'
    )

from gradsampler.integrations.diffusers.decoding import decode
from gradsampler.integrations.diffusers.digits_pipeline import digits
from gradsampler.integrations.diffusers.search import optimize, start
from gradsampler.integrations.diffusers.ways import Explanation, Pipeline, explain, pipeline

__all__ = [
    "Explanation",
    "Pipeline",
    "decode",
    "digits",
    "explain",
    "optimize",
    "pipeline",
    "start",
]
