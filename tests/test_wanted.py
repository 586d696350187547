# SPDX-License-Identifier: Apache-2.0
"""What a backward pass does not ask for is not computed, as with plain autograd."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gradsampler as gs
from gradsampler.engine.recomputation import recomputed
from gradsampler.integrations.k_diffusion import log_likelihood
from support.problems import normal
from support.runs import leaf
from support.strategies import STRATEGIES
from support.tiers import few

WIDTH, BATCH, STEPS = 6, 3, 5
PRODUCT = 2 * BATCH * WIDTH * WIDTH  # floating-point operations of a matrix product
SIGMAS = gs.schedules.karras(STEPS, sigma_min=0.1, sigma_max=4.0).double()
TARGETS = ("z0", "cond", "sigmas", "weight", "bias")
RECOMPUTING = ["checkpoint", "offload", "revolve:2", "auto"]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)).double()


def gradients(network, memory, targets, ask):
    network.zero_grad()
    inputs = {"z0": normal(BATCH, WIDTH), "cond": torch.ones(WIDTH), "sigmas": SIGMAS}
    inputs = {name: leaf(x.double().clone()) for name, x in inputs.items()}
    pool = {**inputs, "weight": network[0].weight, "bias": network[2].bias}
    x = gs.sample(
        lambda x, sigma, cond: network(x) * cond,
        inputs["z0"],
        inputs["sigmas"],
        solver="euler_ancestral",
        memory=memory,
        cond={"cond": inputs["cond"]},
    )
    return ask(x.square().sum(), [pool[name] for name in targets])


def through_inputs(loss, targets):
    loss.backward(inputs=targets)
    return [x.grad for x in targets]


def through_all(loss, targets):
    loss.backward()
    return [x.grad for x in targets]


def after_another(loss, targets):
    """Two passes over one run that ask for different gradients."""
    torch.autograd.grad(loss, targets[:1], retain_graph=True)
    return torch.autograd.grad(loss, targets)


@pytest.mark.parametrize("memory", few(RECOMPUTING, "checkpoint"))
@pytest.mark.parametrize("ask", [torch.autograd.grad, through_inputs, through_all, after_another])
def test_any_choice_has_the_gradients_of_autograd(network, memory, ask):
    for targets in [*combinations(TARGETS, 1), *combinations(TARGETS, 2), TARGETS]:
        got = gradients(network, memory, targets, ask)
        wanted = gradients(network, "store", targets, ask)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory", ["checkpoint", "offload"])
@pytest.mark.parametrize(
    ("targets", "backward"),  # products with a matrix in the backward of a call
    [(("z0",), 2), (("weight",), 3), (("z0", "weight"), 3), (("bias",), 2)],
)
def test_matrix_products(network, memory, targets, backward):
    """Through the weights to the state before costs one of each layer, to a weight one more."""
    with FlopCounterMode(display=False) as counter:
        gradients(network, memory, targets, torch.autograd.grad)
    assert counter.get_total_flops() == STEPS * (2 + 2 + backward) * PRODUCT


def test_parameters_of_a_single_call(network):
    x = leaf(normal(BATCH, WIDTH))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(recomputed(network, [x]).sum(), x)
    assert counter.get_total_flops() == (2 + 2 + 2) * PRODUCT
    with FlopCounterMode(display=False) as counter:
        recomputed(network, [x]).sum().backward()
    assert counter.get_total_flops() == (2 + 2 + 4) * PRODUCT


def convolved(x, network):
    """Operations of a decode and of its backward to x."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(gs.decode(network, x, memory="halo", tile=6).sum(), x)
    return counter.get_total_flops()


def test_weights_of_a_decoder():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))
    x = leaf(normal(1, 3, 12, 12).float())
    trained = convolved(x, network)
    assert trained == convolved(x, network.requires_grad_(False))


@pytest.mark.parametrize("memory", few(STRATEGIES, "checkpoint"))
def test_hooks_on_what_modules_receive(network, memory, tmp_path):
    """As torch's trackers of modules set them; on leaves they fail."""
    seen = []

    def watch(module, args):
        torch.autograd.graph.register_multi_grad_hook(args, lambda grads: seen.append(len(grads)))

    cond = leaf(torch.ones(BATCH, WIDTH, dtype=torch.float64))
    gate = nn.Linear(WIDTH, WIDTH).double()
    for module in (*network, gate):
        module.register_forward_pre_hook(watch)
    x = gs.sample(
        lambda x, sigma, cond: network(x) + gate(cond),
        leaf(normal(BATCH, WIDTH)),
        SIGMAS,
        memory=STRATEGIES[memory](tmp_path),
        cond={"cond": cond * 1.0},
    )
    x.sum().backward()
    assert len(seen) >= 4 * STEPS


def test_a_check_and_a_likelihood_under_such_hooks(network):
    def watch(module, args):
        followed = [x for x in args if x.requires_grad]
        if followed and torch.is_grad_enabled():
            torch.autograd.graph.register_multi_grad_hook(followed, lambda grads: None)

    network[0].register_forward_pre_hook(watch)
    cond = {"shift": torch.ones(BATCH, WIDTH, dtype=torch.float64)}

    def denoiser(x, sigma, shift):
        return network(x) + 0.1 * shift

    x = leaf(normal(BATCH, WIDTH))
    assert gs.check(denoiser, x, SIGMAS, cond=cond).passed
    pytest.importorskip("torchdiffeq")
    found, _ = log_likelihood(denoiser, x, 0.1, 4.0, cond)
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()
    with torch.no_grad():
        again, _ = log_likelihood(denoiser, x, 0.1, 4.0, cond)
    assert again.isfinite().all()
