# SPDX-License-Identifier: Apache-2.0
"""Searches over noises that two ranks share, against the search of one process."""

import os
import shutil
import sys

import pytest
import torch
import torch.distributed as dist

import gradsampler as gs
from support.cases import Cases
from support.problems import normal

SIGMAS = gs.schedules.karras(4, sigma_min=0.1, sigma_max=5.0)
case = CASES = Cases()
run = CASES.run


def denoiser(x, sigma, shift=None):
    return torch.tanh(x) * 0.5 + (0 if shift is None else 0.1 * shift)


def loss(x):
    return (x - 0.3).square().flatten(1).sum(1).mean()


def search(group=None, steps=4, **options):
    """The whole batch is the same on all ranks; 5 samples are not shared evenly."""
    z0 = normal(5, 3, 4).requires_grad_()
    given = {"cond": {"shift": normal(5, 3, 4, seed=1)}, "solver": "euler_ancestral"}
    given |= {"regularizer": gs.regularizers.ChiNorm(0.01), "grad_clip": 0.5, "lr": 0.1}
    return gs.optimize(denoiser, z0, SIGMAS, loss, steps=steps, group=group, **(given | options))


def same(one, two, exact=False):
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(one.z0, two.z0, **tolerance)
    torch.testing.assert_close(one.sample, two.sample, **tolerance)
    for a, b in zip(one.history, two.history, strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=0 if exact else 1e-11)


@case
def two_ranks_find_what_one_process_does(folder):
    for noise in (None, gs.noise.Philox(4), gs.noise.Mixture(gs.noise.SignedRoll(1), 0.6, 2)):
        same(search(dist.group.WORLD, noise=noise), search(noise=noise))
    deterministic = {"solver": "heun", "memory": "checkpoint", "start": 5 * normal(5, 3, 4, seed=3)}
    same(search(dist.group.WORLD, **deterministic), search(**deterministic))


@case
def one_bar_one_file_and_any_number_of_ranks_goes_on(folder):
    rank, path = dist.get_rank(), f"{folder}/search"
    whole = search(steps=6)
    search(dist.group.WORLD, steps=2, checkpoint=path, progress=True)
    if rank == 0:
        assert os.listdir(folder) == ["search"]
        shutil.copy(path, f"{folder}/alone")
    dist.barrier()
    same(search(dist.group.WORLD, steps=6, checkpoint=path), whole)
    if rank == 0:  # one process goes on from the file of two
        same(search(steps=4, checkpoint=f"{folder}/alone"), search(steps=4))
    dist.barrier()
    same(search(dist.group.WORLD, steps=6, checkpoint=f"{folder}/alone"), whole)
    with pytest.raises((ValueError, RuntimeError), match="be of this run"):
        search(dist.group.WORLD, checkpoint=path, noise=gs.noise.Philox(9))


@case
def an_error_of_one_rank_is_one_on_all(folder):
    rank, steps = dist.get_rank(), []

    def failing(x):
        steps.append(1)
        if rank == 1 and len(steps) == 3:
            raise KeyError("a failure of the user's")
        return loss(x)

    z0 = normal(5, 3, 4).requires_grad_()
    options = {"checkpoint": f"{folder}/search", "group": dist.group.WORLD}
    error = KeyError if rank == 1 else RuntimeError
    with pytest.raises(error, match="a failure of the user's"):
        gs.optimize(denoiser, z0, SIGMAS, failing, **options)

    def nan(x):
        return loss(x) * (torch.nan if rank == 0 else 1.0)

    with pytest.raises(gs.NonFiniteError, match="loss of optimisation step 2 must be finite"):
        gs.optimize(denoiser, z0, SIGMAS, nan, **options)
    with pytest.raises((ValueError, OSError, RuntimeError), match="lie in a folder that exists"):
        gs.optimize(denoiser, z0, SIGMAS, loss, group=dist.group.WORLD, checkpoint="/nowhere/x")
    with pytest.raises(ValueError, match="z0 must hold a sample for each of the 2 ranks"):
        gs.optimize(
            denoiser, z0[:1].detach().requires_grad_(), SIGMAS, loss, group=dist.group.WORLD
        )


@case
def a_rank_that_is_killed_ends_the_others(folder):
    rank, steps = dist.get_rank(), []

    def mortal(x):
        steps.append(1)
        if rank == 1 and len(steps) == 4:
            sys.stdout.flush()
            os._exit(3)
        return loss(x)

    z0 = normal(5, 3, 4).requires_grad_()
    options = {"checkpoint": f"{folder}/search", "solver": "euler_ancestral"}
    with pytest.raises(RuntimeError):
        gs.optimize(denoiser, z0, SIGMAS, mortal, group=dist.group.WORLD, **options)
    # The file holds the three steps that were completed, and one process goes on from it.
    found = gs.optimize(denoiser, z0, SIGMAS, loss, steps=3, **options)
    whole = gs.optimize(denoiser, z0, SIGMAS, loss, steps=3, solver="euler_ancestral")
    same(found, whole)
