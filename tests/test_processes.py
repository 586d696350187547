# SPDX-License-Identifier: Apache-2.0
"""Runs and forks of their process."""

import os
import signal
from functools import partial

import pytest
import torch

import gradsampler as gs
from gradsampler.memory import Offload, Revolve
from support.gradients import assert_close, gradients
from support.problems import normal
from support.runs import leaf

SIGMAS = gs.schedules.karras(6, sigma_min=0.05, sigma_max=9.0)
FOLDERS = {"offload": Offload, "revolve": lambda folder: Revolve(1, 3, folder)}

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    # Later Pythons warn of a fork of a process with threads, which is what is tried here.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def forked(work):
    """What ``work`` returns in a fork of this process, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a fork that hangs is to fail
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        text = file.read()
    assert status == 0, f"the fork ended with {status}: {text}"
    return text


def denoiser(x, sigma):
    return torch.tanh(x)


@pytest.mark.parametrize("memory", FOLDERS)
def test_the_backward_of_a_run_with_a_folder_in_a_fork_is_an_error(memory, tmp_path):
    z0 = leaf(normal(2, 3))
    x = gs.sample(denoiser, z0, SIGMAS, memory=FOLDERS[memory](tmp_path))
    (expected,) = gradients(gs.sample(denoiser, z0, SIGMAS, memory="store"), [z0])
    message = forked(partial(gradients, x, [z0]))
    assert message.startswith(f"RuntimeError: memory={memory.title()}: the backward of a run")
    assert f"in the process of the run, {os.getpid()}, got its fork" in message
    assert "memory='checkpoint'" in message
    assert len(list(tmp_path.iterdir())) == 1  # the fork has removed nothing
    assert_close(*gradients(x, [z0]), expected)
    del x
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", ["checkpoint", *FOLDERS])
def test_a_run_in_a_fork(memory, tmp_path):
    z0 = leaf(normal(2, 3))
    strategy = FOLDERS.get(memory, lambda folder: memory)

    def work():
        return gradients(gs.sample(denoiser, z0, SIGMAS, memory=strategy(tmp_path)), [z0])

    assert forked(work) == str(work())


def test_the_backward_of_a_run_without_a_folder_in_a_fork():
    z0 = leaf(normal(2, 3))
    x = gs.sample(denoiser, z0, SIGMAS, memory="checkpoint")
    text = forked(partial(gradients, x, [z0], retain_graph=True))
    assert text == str(gradients(x, [z0]))
