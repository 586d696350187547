# SPDX-License-Identifier: Apache-2.0
"""A run whose only target is z0: what frozen networks keep, counted, and that it is enough."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from gradsampler.memory import freeze
from gradsampler.memory.planning.gauge import Live
from support.alive import no_collector
from support.euler import euler
from support.gradients import assert_close, gradients
from support.problems import normal
from support.runs import leaf
from support.strategies import STRATEGIES, strategies

BATCH, WIDTH, SIDE = 2, 8, 16
STATE = 4 * BATCH * WIDTH * SIDE**2  # bytes in float32


class Attention(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).mT).unsqueeze(1).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.squeeze(1)).mT.reshape(x.shape)


def network(seed=0, dtype=torch.float64):
    """A residual block and an attention, as in a U-Net."""
    torch.manual_seed(seed)
    layers = [nn.GroupNorm(2, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)]
    layers += [nn.GroupNorm(2, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 1), Attention()]
    return nn.Sequential(*layers).to(dtype)


def thawed(net):
    return net


def plainly(net):
    return net.requires_grad_(False)


def kept(layer, x):
    """Bytes that a call's graph keeps beside the layer's output, in units of its input's."""
    with no_collector(), Live() as counter:
        h = x.detach().requires_grad_() * 2
        size, y = h.untyped_storage().nbytes(), layer(h)
        del h
        return (counter.live - y.untyped_storage().nbytes()) / size


IMAGE, ROWS = (BATCH, WIDTH, SIDE, SIDE), (BATCH, 64)
# layer, input, what is kept with free parameters, frozen, and after `freeze`
LAYERS = {
    "linear": (lambda: nn.Linear(64, 64), ROWS, 1, 0, 0),
    "conv": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), IMAGE, 1, None, 0),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, dilation=2), (BATCH, 4, 64), 1, None, 0),
    "transposed": (lambda: nn.ConvTranspose2d(WIDTH, 4, 3), IMAGE, 1, None, 0),
    "group norm": (lambda: nn.GroupNorm(2, WIDTH), IMAGE, 1, 1, 1),
    "layer norm": (lambda: nn.LayerNorm(64), ROWS, 1, 1, 1),
    "silu": (nn.SiLU, ROWS, 1, 1, 1),
    "tanh": (nn.Tanh, ROWS, 0, 0, 0),  # its output
    "scale": (lambda: Scale(), ROWS, 1, 0, 0),
}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_keeps(name):
    make, shape, free, frozen, forgetting = LAYERS[name]
    x, small = normal(*shape, dtype=torch.float32), 0.1  # statistics and scales
    assert free <= kept(make(), x) < free + small
    if frozen is not None:  # else torch keeps it, for the gradient that nobody wants
        assert frozen <= kept(plainly(make()), x) < frozen + small
    assert forgetting <= kept(freeze(make()), x) < forgetting + small


@cache
def warm(memory):
    """A run before those that are measured: sums of outputs have their weights once a process."""
    net, z0 = network(dtype=torch.float32), leaf(normal(*IMAGE).float())
    x = gs.sample(lambda x, sigma: net(x), z0, gs.schedules.karras(2), memory=memory)
    x.sum().backward()


def alive(prepare, memory, steps):
    """States that are there between a run and its backward, and at most within it."""
    warm(memory)
    net, z0, within = prepare(network(dtype=torch.float32)), normal(*IMAGE).float(), []
    z0.requires_grad_()

    def denoiser(x, sigma):
        y = net(x)
        within.append(counter.live / STATE)
        return y

    with no_collector(), Live() as counter:
        x = gs.sample(denoiser, z0, gs.schedules.karras(steps), memory=memory)
        between = counter.live / STATE
        within.clear()
        x.sum().backward()  # which asks for the gradients of all that requires one
        return between, max(within, default=0)


# Of the block above, in states: the inputs of two norms and of two activations, q, k and v in one
# tensor, the attention's output; and for weights the inputs of two convolutions and a linear.
NEEDED, FOR_WEIGHTS = 2 + 2 + 3 + 1, 3


@pytest.mark.parametrize(
    ("prepare", "states"),
    [(thawed, NEEDED + FOR_WEIGHTS), (freeze, NEEDED)],
    ids=["free", "frozen"],
)
def test_store_keeps_what_a_call_needs(prepare, states):
    few, many = (alive(prepare, "store", steps)[0] for steps in (3, 7))
    assert states <= (many - few) / 4 < states + 0.2


def test_frozen_without_forgetting_is_in_between():
    few, many = (alive(plainly, "store", steps)[0] for steps in (3, 7))
    assert NEEDED <= (many - few) / 4 < NEEDED + FOR_WEIGHTS - 0.8


@pytest.mark.parametrize("memory", ["checkpoint", "revolve:2"])
def test_the_peak_of_one_call_goes_down_as_well(memory):
    (_, free), (_, frozen) = (alive(prepare, memory, 5) for prepare in (thawed, freeze))
    # Of gradients to the parameters one set, summed over the calls.
    gradients = sum(4 * p.numel() for p in network().parameters()) / STATE
    assert FOR_WEIGHTS <= free - frozen <= FOR_WEIGHTS + gradients


@pytest.mark.parametrize("prepare", [thawed, freeze])
def test_checkpoint_keeps_states_alone(prepare):
    few, many = (alive(prepare, "checkpoint", steps)[0] for steps in (3, 7))
    assert 1 <= (many - few) / 4 < 1.05  # and the sketches of the outputs


# The gradients are the same.


@strategies
def test_gradients_of_a_frozen_network(memory, tmp_path):
    z0, free, frozen = leaf(normal(*IMAGE)), network(), freeze(network())
    sigmas = gs.schedules.karras(6, sigma_min=0.05, sigma_max=9.0)
    (wanted,) = gradients(euler(lambda x, s: free(x), z0, sigmas), [z0])
    options = {"memory": STRATEGIES[memory](tmp_path)}
    got = gradients(gs.sample(lambda x, s: frozen(x), z0, sigmas, **options), [z0])
    assert_close(*got, wanted)
    assert all(p.grad is None for p in frozen.parameters())


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2), (2, 4, 11)),
    "2d strided": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 9)),
    "2d circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 9, 9)),
    "2d same": (lambda: nn.Conv2d(3, 5, 3, padding="same", bias=False), (2, 3, 9, 9)),
    "2d unbatched": (lambda: nn.Conv2d(3, 5, 3), (3, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_a_convolution(name, dtype):
    make, shape = CONVOLUTIONS[name]
    layer, x = make().to(dtype), leaf(normal(*shape, dtype=dtype))
    wanted = gradients(layer(x * 2), [x])
    got = gradients(freeze(layer)(x * 2), [x])
    assert_close(got[0], wanted[0], 4 * torch.finfo(dtype).eps)


def test_channels_last_and_autocast():
    layer, x = (
        nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        leaf(normal(*IMAGE).float()),
    )
    for enabled in (False, True):
        found = []
        for conv in (layer.requires_grad_(True), freeze(layer)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = conv((x * 2).to(memory_format=torch.channels_last))
            found += gradients(y.float(), [x])
        assert_close(found[1], found[0], 8e-3 if enabled else 1e-6)


def test_second_derivatives_through_a_frozen_convolution():
    layer = freeze(nn.Conv2d(2, 3, 2).double())

    def run(x):
        return layer(torch.tanh(x)).sin()

    x = leaf(normal(1, 2, 3, 3))
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_what_requires_a_gradient_again_gets_it():
    layer, x = nn.Conv2d(2, 3, 2).double(), leaf(normal(1, 2, 4, 4))
    wanted = gradients(layer(x * 2), [x, layer.weight, layer.bias])
    freeze(freeze(layer)).requires_grad_(True)
    assert len(layer._forward_hooks) == 1
    for g, w in zip(gradients(layer(x * 2), [x, layer.weight, layer.bias]), wanted, strict=True):
        assert torch.equal(g, w)
    layer.weight.requires_grad_(False)
    assert torch.equal(gradients(layer(x * 2), [layer.bias])[0], wanted[2])


class Offset(nn.Module):
    """A parametrization: the weight that the layer sees is no parameter."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, weight):
        return weight + self.offset


def test_a_computed_weight_is_none_that_is_frozen():
    layer, x = freeze(nn.Conv2d(2, 3, 2).double()), normal(1, 2, 4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Offset())
    offset = layer.parametrizations.weight[0].offset
    (got,) = gradients(layer(x), [offset])
    weight = layer.parametrizations.weight.original.detach()
    expected = nn.functional.conv2d(x, weight + offset, layer.bias)
    assert_close(got, gradients(expected, [offset])[0])


def test_within_hooks_on_saved_tensors_and_activation_checkpoints():
    free, frozen, x = network(), freeze(network()), leaf(normal(*IMAGE))
    (wanted,) = gradients(free(x), [x])
    with torch.autograd.graph.save_on_cpu():
        y = frozen(x)
    assert_close(*gradients(y, [x]), wanted)
    assert_close(*gradients(checkpoint(frozen, x, use_reentrant=False), [x]), wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(mode):
    frozen, x = freeze(network()), normal(*IMAGE)
    with mode():
        assert torch.equal(frozen(x), network()(x))
