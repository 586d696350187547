# SPDX-License-Identifier: Apache-2.0
"""The registered noise sources with parameters, and how many noises a run injects."""

import torch

import gradsampler as gs

Z0 = torch.zeros(1, 2)


class Bent(gs.noise.NoiseSource):
    """A source of a user's own, which no kernel knows: only its definition."""

    def at(self, z0, step, num_steps, draw=0):
        return torch.sin((0.4 * step + 1) * z0 + draw) + (step + 1) / num_steps * z0.flip(-1)


def every(z0, count):
    """The registered sources for a run from z0 that injects so often, and one of a user's own."""
    return gs.noise.typical(z0, count) | {"own": Bent()}


KINDS = tuple(every(Z0, 1))

# The sources that are functions of z0 and numbers alone; a mixture as well that is not registered.
SOURCES = {name: x for name, x in every(Z0, 1).items() if not x.tensors} | {
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
    noise = every(z0.detach(), count)[kind]
    return noise, [x.requires_grad_() for x in noise.tensors]
