# SPDX-License-Identifier: Apache-2.0
"""Step noises: what a sampler injects at step i of N, as a function of the initial noise z0."""

from gradsampler.noise.named import names, register, resolve, typical
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import (
    Given,
    Mixture,
    NoiseSource,
    Off,
    Philox,
    SignedRoll,
    SinCos,
)

__all__ = [
    "Given",
    "Mixture",
    "NoiseSource",
    "Off",
    "Philox",
    "Replayed",
    "SignedRoll",
    "SinCos",
    "names",
    "register",
    "resolve",
    "typical",
]
