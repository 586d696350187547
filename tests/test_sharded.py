# SPDX-License-Identifier: Apache-2.0
"""Noise by global index: the runs of parts are the parts of the run."""

import pytest
import torch

import gradsampler as gs
from gradsampler.noise import Mixture, Off, Philox, Sharded, SignedRoll, SinCos
from support.problems import normal
from support.tiers import pairs

SIGMAS = gs.schedules.karras(4, sigma_min=0.1, sigma_max=5.0)
SOURCES = {
    "off": Off(),
    "sincos": SinCos(),
    "signed_roll": SignedRoll(5),
    "philox": Philox(2**63),
    "consistent": Philox(3, consistent=True),
    "mixture": Mixture(SignedRoll(3), 0.7, 9),
}
BACKENDS = ["reference", "cpu", "triton"]
CUTS = [(0, 1), (1, 4), (4, 5)]  # uneven; a sample has no multiple of 4 elements


def denoiser(x, sigma):
    return 0.5 * x - 0.01 * x * x  # in no order of elements


def run(z0, noise, backend, memory="checkpoint"):
    z0 = z0.detach().requires_grad_()
    options = {"solver": "euler_ancestral", "memory": memory, "backend": backend}
    x = gs.sample(denoiser, z0, SIGMAS, noise=noise, **options)
    x.square().sum().backward()
    return x.detach(), z0.grad


@pairs(
    backend=BACKENDS,
    source=list(SOURCES),
    dtype=[torch.float32, torch.float64],
    memory=["checkpoint", "store"],
)
def test_parts_of_a_batch(backend, source, dtype, memory):
    """To the bit, forward and back; what Triton fuses of a mixture and what differs is rounding."""
    if backend == "triton":
        pytest.importorskip("triton")
    z0 = normal(5, 3, 7, dtype=dtype)
    whole, dz0 = run(z0, SOURCES[source], backend, memory)
    for begin, end in CUTS:
        x, g = run(z0[begin:end], Sharded(SOURCES[source], begin), backend, memory)
        if backend == "triton" and source == "mixture":
            torch.testing.assert_close(x, whole[begin:end])
            torch.testing.assert_close(g, dz0[begin:end])
        else:
            assert torch.equal(x, whole[begin:end])
            assert torch.equal(g, dz0[begin:end])


@pairs(
    backend=BACKENDS, source=["signed_roll", "philox", "mixture"], dim=[1, 2],
    memory=["checkpoint", "store", "revolve:2"],
)  # fmt: skip
def test_parts_of_a_state(backend, source, dim, memory):
    """To the bit forward; the shares of the gradient of z0 add up to that of the whole."""
    if backend == "triton":
        pytest.importorskip("triton")
    z0 = normal(2, 5, 6)
    whole, dz0 = run(z0, SOURCES[source], backend, memory)
    total = torch.zeros_like(z0)
    for begin, end in ((0, 2), (2, z0.shape[dim])):
        replica = z0.detach().requires_grad_()
        noise = Sharded(SOURCES[source], begin, dim, replica)
        part = replica.narrow(dim, begin, end - begin)
        options = {"solver": "euler_ancestral", "memory": memory, "backend": backend}
        x = gs.sample(denoiser, part, SIGMAS, noise=noise, **options)
        if backend == "triton" and source == "mixture":
            torch.testing.assert_close(x, whole.narrow(dim, begin, end - begin))
        else:
            assert torch.equal(x, whole.narrow(dim, begin, end - begin))
        x.square().sum().backward()
        total += replica.grad
    torch.testing.assert_close(total, dz0, rtol=1e-12, atol=1e-12)


def test_messages():
    z0 = normal(2, 6)
    with pytest.raises(ValueError, match=r"Sharded: source must be the noise of a whole"):
        Sharded(gs.noise.Given([z0]), 0)
    with pytest.raises(ValueError, match=r"Sharded: whole must be given for a part of a state"):
        Sharded(SignedRoll(), 0, dim=1)
    with pytest.raises(ValueError, match=r"Sharded: whole must be None for a part of a batch"):
        Sharded(SignedRoll(), 0, whole=z0)
    with pytest.raises(ValueError, match=r"Sharded: offset must be at least 0"):
        Sharded(SignedRoll(), -1)
    with pytest.raises(TypeError, match=r"Sharded: source must be a gradsampler.noise object"):
        Sharded("off", 0)
    for noise, message in (
        (Sharded(SignedRoll(), 1, 1, z0), r"offset must be at most 0"),
        (Sharded(SignedRoll(), 0, 1, z0[:1]), r"whole must have shape \[2, 6\]"),
        (Sharded(SignedRoll(), 0, 3, z0), r"dim must be an axis of z0, below 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gs.sample(denoiser, z0, SIGMAS, solver="euler_ancestral", noise=noise)
