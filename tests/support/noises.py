# SPDX-License-Identifier: Apache-2.0
"""The registered noise sources with parameters, and how many noises a run injects."""

import pytest
import torch

import gradsampler as gs

KINDS = tuple(gs.noise.typical(torch.zeros(1, 2), 1))
kinds = pytest.mark.parametrize("kind", KINDS)


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
