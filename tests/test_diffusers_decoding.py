# SPDX-License-Identifier: Apache-2.0
"""The autoencoders of diffusers in bounded memory, against their own decode."""

from typing import Any

import pytest
import torch

import gradsampler.integrations.diffusers as gsd
from gradsampler.memory.planning.gauge import Live
from support.alive import no_collector
from support.pipelines import apart, diffusers, vae
from support.tiers import few

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def image_vae() -> Any:
    torch.manual_seed(0)
    decoder = vae(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    return decoder.eval().double().requires_grad_(False)


def wan() -> Any:
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return decoder.eval().double().requires_grad_(False)


def cogvideox() -> Any:
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return decoder.eval().double().requires_grad_(False)


def latents(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradient(y, x):
    return torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.parametrize("memory", ["store", "blocks", "auto"])
def test_an_image_is_the_same_to_the_bit(memory):
    network, x = image_vae(), latents(2, 4, 6, 5)
    whole = network.decode(x).sample
    ours = gsd.decode(network, x, memory=memory)
    assert torch.equal(ours, whole)
    assert torch.equal(gradient(ours, x), gradient(whole, x))


@pytest.mark.thorough
def test_halos_are_the_whole_decode_to_rounding():
    network, x = image_vae(), latents(1, 4, 12, 10)
    whole = network.decode(x).sample
    ours = gsd.decode(network, x, memory="halo", tile=32)
    assert apart(ours, whole) < 1e-12
    assert apart(gradient(ours, x), gradient(whole, x)) < 1e-12


@pytest.mark.thorough
def test_the_peak_of_halos_is_that_of_a_tile():
    """Of the image there is what enters and leaves the parts beside it, and no activation."""
    network, x = image_vae(), latents(1, 4, 48, 48)

    def peak(memory, tile):
        with no_collector(), Live() as counter:
            gradient(gsd.decode(network, x, memory=memory, tile=tile), x)
            return counter.peak

    whole, tiled = peak("store", 32), peak("halo", 32)
    inputs = 2 * 192 * 192 * 8 * 8  # what enters the last part, half as large, and what leaves it
    tile = (32 + 2 * 9) ** 2 / 192**2  # whose halo is of eight convolutions
    assert tiled < tile * whole + inputs < 0.3 * whole


@pytest.mark.thorough
def test_halos_reach_the_parameters():
    network, x = image_vae(), latents(1, 4, 10, 10)
    weight = network.decoder.up_blocks[1].resnets[0].conv1.weight.requires_grad_()
    wanted = torch.autograd.grad(network.decode(x).sample.square().sum(), weight)[0]
    ours = gsd.decode(network, x, memory="halo", tile=32)
    assert apart(torch.autograd.grad(ours.square().sum(), weight)[0], wanted) < 1e-12


def test_tiles_are_upstreams_function_and_its_gradient():
    network, x = image_vae(), latents(1, 4, 12, 12)
    network.tile_latent_min_size, network.tile_sample_min_size = 8, 32
    tiled = network.tiled_decode(x).sample
    ours = gsd.decode(network, x, memory="tiles")
    assert torch.equal(ours, tiled)
    assert apart(gradient(ours, x), gradient(tiled, x)) < 1e-12
    assert apart(tiled, network.decode(x).sample) > 0.01  # which is another function


@pytest.mark.thorough
@pytest.mark.parametrize("build", [wan, cogvideox])
@pytest.mark.parametrize("memory", ["frames", "blocks"])
def test_a_video_with_a_causal_cache_is_the_same_to_the_bit(build, memory):
    network, x = build(), latents(1, 4, 5, 4, 4)
    whole = network.decode(x).sample
    ours = gsd.decode(network, x, memory=memory)
    assert torch.equal(ours, whole)
    assert apart(gradient(ours, x), gradient(whole, x)) < 1e-12


@pytest.mark.parametrize("memory", few(["frames", "blocks", "store"], "frames"))
def test_a_video_leaves_nothing_behind(memory):
    """No call holds the lists of remembered frames, which come to hold what it returns."""
    network, x = wan(), latents(1, 4, 3, 2, 2)
    with no_collector(), Live() as counter:
        y = gsd.decode(network, x, memory=memory)
        found = gradient(y, x)
        del y
        assert counter.live < 2 * found.nbytes


@pytest.mark.thorough
def test_frames_keep_less_than_blocks():
    network = wan()

    def kept(memory, count):
        x = latents(1, 4, count, 4, 4)
        with no_collector(), Live() as counter:
            y = gsd.decode(network, x, memory=memory)
            return counter.live - y.nbytes

    for_a_chunk = {m: kept(m, 9) - kept(m, 5) for m in ("store", "blocks", "frames")}
    assert for_a_chunk["frames"] < 0.7 * for_a_chunk["blocks"] < 0.5 * for_a_chunk["store"]


def test_a_layer_without_a_halo_is_named():
    torch.manual_seed(0)
    network = vae(up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D")).double()
    with pytest.raises(ValueError, match=r"decoder\.up_blocks\.0\.attentions\.0 must read"):
        gsd.decode(network, latents(1, 4, 8, 8), memory="halo")
    with pytest.raises(ValueError, match="memory must be other than 'halo' for an autoencoder"):
        gsd.decode(wan(), latents(1, 4, 2, 4, 4), memory="halo")
    with pytest.raises(ValueError, match="memory must be other than 'frames' for images"):
        gsd.decode(image_vae(), latents(1, 4, 8, 8), memory="frames")
    with pytest.raises(ValueError, match="memory must be one of auto, blocks, frames"):
        gsd.decode(image_vae(), latents(1, 4, 8, 8), memory="slices")
