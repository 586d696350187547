# SPDX-License-Identifier: Apache-2.0
"""The noise sources with parameters, and how many noises a run injects."""

import torch

import gradsampler as gs
from support.problems import normal
from support.runs import leaf

NOISES = {
    "off": gs.noise.Off,
    "sincos": lambda: gs.noise.SinCos(phase_rate=0.3, sin_amp=0.4, cos_amp=0.2),
    "signed_roll": lambda: gs.noise.SignedRoll(seed=5),
    "philox": lambda: gs.noise.Philox(seed=7),
    "mixture": lambda: gs.noise.Mixture(gs.noise.SignedRoll(seed=1), angle=0.6, seed=2),
    "given": None,  # its tensors are made for the run
}


class Counting(gs.noise.Off):
    """Tells how many noises a run injects."""

    def prepare(self, z0, steps):
        object.__setattr__(self, "count", len(steps))
        return self


def injections(z0, sigmas, **options):
    counting = Counting()
    gs.sample(lambda x, sigma: 0.5 * x, z0, sigmas, noise=counting, **options)
    return counting.count


def make_noise(kind, count, z0, like=torch.float64):
    """The noise of that kind, and its tensors that require grad."""
    if kind != "given":
        return NOISES[kind](), []
    tensors = [leaf(normal(*z0.shape, seed=50 + k, dtype=like)) for k in range(count)]
    return gs.noise.Given(tensors), tensors
