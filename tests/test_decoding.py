# SPDX-License-Identifier: Apache-2.0
"""Decoders in bounded memory against plain autograd through the whole decode."""

import weakref

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.decoding import decode as module
from gradsampler.decoding.blocks import blocks, blockwise
from gradsampler.decoding.halo import Normalized, Piece, exact_tiles, field_of_view
from gradsampler.memory import capacity


class Residual(nn.Module):
    """Two convolutions with group normalisations, and a way around them."""

    def __init__(self, channels, width):
        super().__init__()
        self.norm1 = nn.GroupNorm(2, channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.around = nn.Conv2d(channels, width, 1)

    def forward(self, x):
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.around(x) + self.conv2(nn.functional.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Every pixel reads every other."""

    def __init__(self, channels):
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        flat = self.project(x).flatten(2)
        return x + (torch.softmax(flat.mT @ flat, 1) @ flat.mT).mT.view(x.shape)


def decoder(*more):
    """Latents of 4 channels to pictures of 3, twice as large."""
    torch.manual_seed(0)
    return nn.Sequential(
        Residual(4, 8),
        *more,
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1),
        Residual(8, 4),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 3, 3, padding=1),
    ).double()


def latents(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(y, x, network):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return torch.autograd.grad((y.tanh() * weights).sum(), [x, *network.parameters()])


def kept_bytes(network, run):
    """What autograd keeps of a run, parameters aside."""
    parameters = {p.data_ptr() for p in network.parameters()}
    kept = weakref.WeakSet()

    class Saved:
        def __init__(self, x):
            self.x = x.detach()  # a result would keep its own graph alive
            kept.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
        result = run()
    assert result.requires_grad
    storages = [each.x.untyped_storage() for each in kept if each.x.data_ptr() not in parameters]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def test_blocks_are_the_same_function_to_the_bit():
    network, x = decoder(Attention(8)), latents(2, 4, 6, 5)
    whole, by_blocks = network(x), gs.decode(network, x, memory="blocks")
    assert torch.equal(whole, by_blocks)
    for a, b in zip(gradients(whole, x, network), gradients(by_blocks, x, network), strict=True):
        assert torch.equal(a, b)


def test_blocks_keep_their_inputs_alone():
    network, x = decoder(), latents(1, 4, 16, 16)
    network.requires_grad_(False)
    assert [type(block) for block in blocks(network)] == [Residual, Residual]
    whole = kept_bytes(network, lambda: network(x))
    assert kept_bytes(network, lambda: gs.decode(network, x, memory="blocks")) < 0.5 * whole
    assert network[0] is next(iter(blocks(network)))  # the user's is as it was


def test_a_block_may_write_to_a_list():
    """As causal video decoders do with the frames that they remember."""

    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, memory):
            memory[0], before = x, memory[0]
            return self.linear(x if before is None else x + before).sin()

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Remembering()

        def forward(self, frames):
            memory = [None]
            return torch.stack([self.block(frame, memory) for frame in frames])

    torch.manual_seed(0)
    network, frames = Frames(), torch.randn(4, 2, 3, requires_grad=True)
    whole, by_blocks = network(frames), blockwise(network)(frames)
    assert torch.equal(whole, by_blocks)
    named = [frames, *network.parameters()]
    wanted = torch.autograd.grad(whole.square().sum(), named)
    for a, b in zip(torch.autograd.grad(by_blocks.square().sum(), named), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("size", [4, 7, 32])
def test_tiles_with_halos_are_the_whole_decode_to_rounding(size):
    network, x = decoder(), latents(2, 4, 11, 9)
    whole, tiled = network(x), gs.decode(network, x, memory="halo", tile=size)
    assert torch.allclose(tiled, whole, rtol=0, atol=1e-12)
    for a, b in zip(gradients(tiled, x, network), gradients(whole, x, network), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_tiles_with_halos_in_float32():
    network, x = decoder().float(), latents(1, 4, 12, 12).detach().float().requires_grad_()
    network.requires_grad_(False)
    whole, tiled = network(x), gs.decode(network, x, memory="halo", tile=5)
    assert torch.allclose(tiled, whole, atol=1e-5)
    ours, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (tiled, whole))
    assert (ours - wanted).norm() < 1e-5 * wanted.norm()


def test_tiles_with_halos_in_bfloat16():
    """No farther from the decode in float64 than the whole decode in bfloat16 is, twice."""
    x = latents(1, 4, 12, 12)
    exact = decoder()(x)
    network, narrow = decoder().bfloat16(), x.detach().bfloat16().requires_grad_()
    whole, tiled = network(narrow), gs.decode(network, narrow, memory="halo", tile=5)
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).norm() < 2 * (whole - exact).norm()
    wanted, direct, ours = (
        torch.autograd.grad(y.square().sum(), leaf)[0]
        for y, leaf in ((exact, x), (whole, narrow), (tiled, narrow))
    )
    assert (ours - wanted).norm() < 2 * (direct - wanted).norm()


def test_what_a_normalisation_keeps_is_its_input():
    network, x = nn.Sequential(nn.GroupNorm(2, 4)), latents(1, 4, 12, 12)
    given, core = torch.tensor([[0.0, 0.1], [1.0, 2.0]]).double(), (slice(2, 9), slice(1, 12))
    norm = network[0].double()
    args = (x, given, norm.weight, norm.bias, norm.eps, core)
    kept = kept_bytes(network, lambda: Normalized.apply(*args)[0])
    assert kept == 8 * (x.numel() + given.numel())


def test_an_image_that_is_far_from_zero_is_normalised_right():
    """Mean square less squared mean would lose all digits in float32."""
    norm = nn.Sequential(nn.GroupNorm(1, 2, affine=False))
    x = (1e3 + latents(1, 2, 8, 8)).detach().float().requires_grad_()
    assert torch.allclose(gs.decode(norm, x, memory="halo", tile=4), norm(x), atol=1e-3)


def test_the_peak_of_halos_is_that_of_a_tile():
    largest = []

    class Watching(nn.Identity):
        def forward(self, x):
            largest.append(x.shape[-2:].numel())
            return x

    network = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), Watching(), nn.Conv2d(2, 2, 3, padding=1)
    )
    x = torch.randn(1, 2, 200, 200, requires_grad=True)
    y = gs.decode(network, x, memory="halo", tile=20)
    y.sum().backward()
    assert max(largest) <= (20 + 2 * 2) ** 2
    assert torch.allclose(y, network(x), atol=1e-6)


def test_the_field_of_view_is_found():
    pieces = [Piece(str(k), layer) for k, layer in enumerate(decoder())]
    # Two convolutions, then in pixels half as large four, the last of which adds a half.
    assert field_of_view(pieces, latents(1, 4, 4, 4)) == 4
    assert field_of_view(pieces[:1], latents(1, 4, 4, 4)) == 2


def test_a_layer_that_reads_the_whole_image_is_named():
    network = decoder(Attention(8))
    pieces = [Piece(f"up.{k}", layer) for k, layer in enumerate(network)]
    with pytest.raises(ValueError, match=r"up\.1 must read .* got a Attention.*memory='blocks'"):
        exact_tiles(pieces, latents(1, 4, 8, 8), 4)
    with pytest.raises(TypeError, match=r"module must be an nn\.Sequential with memory='halo'"):
        gs.decode(Attention(4), latents(1, 4, 8, 8), memory="halo")


def test_auto_keeps_all_where_there_is_room(monkeypatch):
    network, x = decoder(), latents(1, 4, 16, 16)
    network.requires_grad_(False)
    whole = kept_bytes(network, lambda: network(x))
    by_blocks = kept_bytes(network, lambda: gs.decode(network, x, memory="blocks"))
    for free, wanted in ((4 * whole, whole), (whole, by_blocks)):
        monkeypatch.setattr(capacity, "free", lambda device, free=free: free)
        kept = kept_bytes(network, lambda: gs.decode(network, x))
        assert kept == wanted
    assert module.fits(network, x) is False


def test_a_decode_by_tiles_is_differentiated_once():
    network, x = decoder(), latents(1, 4, 8, 8)
    y = gs.decode(network, x, memory="halo", tile=4)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="memory must be one of auto, blocks, halo, store"):
        gs.decode(decoder(), latents(1, 4, 8, 8), memory="tiles")
    with pytest.raises(TypeError, match=r"latents must be a torch\.Tensor"):
        gs.decode(decoder(), [1.0])
