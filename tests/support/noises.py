# SPDX-License-Identifier: Apache-2.0
"""The registered noise sources with parameters, and how many noises a run injects."""

import torch

import gradsampler as gs

Z0 = torch.zeros(1, 2)
KINDS = tuple(gs.noise.typical(Z0, 1))

# The sources that are functions of z0 and numbers alone; a mixture as well that is not registered.
SOURCES = {name: x for name, x in gs.noise.typical(Z0, 1).items() if not x.tensors} | {
    "philox+sincos": gs.noise.Mixture(gs.noise.SinCos(), 0.4, 11)
}
# Those that kernels draw. The others are evaluated before, and handed over as a tensor.
DRAWN = {name: x for name, x in SOURCES.items() if x.draw(Z0, 0, 1) is not None}


class Counting(gs.noise.Off):
    """Tells how many noises a run injects."""

    def prepare(self, z0, steps):
        object.__setattr__(self, "count", len(steps))
        return self


def injections(z0, sigmas, **options):
    counting = Counting()
    gs.sample(lambda x, sigma: 0.5 * x, z0, sigmas, noise=counting, **options)
    return counting.count


def make_noise(kind, count, z0):
    """The noise of that kind, and its tensors, which require grad."""
    noise = gs.noise.typical(z0.detach(), count)[kind]
    return noise, [x.requires_grad_() for x in noise.tensors]
