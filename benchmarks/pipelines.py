# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a reward's gradient through a diffusers pipeline, and of a decode, against the
resolution or the frames; ours beside the pipeline's own code with gradients on.

make bench-pipelines
"""

import argparse
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import rows
import torch
from torch import Tensor, nn

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from gradsampler.memory.planning.gauge import Live

STEPS = 10
SIZES = (128, 256, 512)
DECODED = (128, 256, 512)
FRAMES = (9, 17, 33)
TILE = 128  # pixels of a side, in the last part
Rows = list[dict[str, str]]


def unet(widths: tuple[int, ...]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=1,
        sample_size=64,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(widths) - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )


def vae(width: int) -> nn.Module:
    """Stable Diffusion's decoder, eight times as large as the latents, but narrower."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )


def pipeline(small: bool) -> Any:
    """Stable Diffusion with a U-Net of 10 million random parameters, all frozen."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=vae(8 if small else 32),
        text_encoder=None,
        tokenizer=None,
        unet=unet((32, 64) if small else (64, 128, 192)),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):
        part.eval().requires_grad_(False)
    return pipe


def reward(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """CLIP's score by a CLIP of random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    config = CLIPConfig(
        text_config={**sizes, "num_attention_heads": 4, "vocab_size": 20, "eos_token_id": 19},
        vision_config={**sizes, "num_attention_heads": 4, "image_size": 64, "patch_size": 8},
        projection_dim=64,
    )
    model = CLIPModel(config).eval().requires_grad_(False)
    return gs.rewards.CLIPScore(model, {"input_ids": torch.tensor([[1, 5, 7, 19]])})


def call(size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 8, 64, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 8, 64, generator=generator),
        "latents": torch.randn(1, 4, size // 8, size // 8, generator=generator).requires_grad_(),
        "height": size,
        "width": size,
        "guidance_scale": 4.0,
        "output_type": "pt",
    }


def upstream(pipe: Any, **arguments: Any) -> Tensor:
    """The pipeline's own code, without the no_grad around it."""
    own = inspect.unwrap(type(pipe).__call__)
    image: Tensor = own(pipe, **arguments, return_dict=False)[0]
    return image


def checkpointed(pipe: Any, **arguments: Any) -> Tensor:
    """The same with diffusers' own gradient checkpointing, which is on in train mode alone."""
    parts = (pipe.unet, pipe.vae)
    for part in parts:
        part.enable_gradient_checkpointing()
        part.train()
    try:
        return upstream(pipe, **arguments)
    finally:
        for part in parts:
            part.disable_gradient_checkpointing()
            part.eval()


def ours(memory: str, decode: str) -> Callable[..., Tensor]:
    def image(pipe: Any, **arguments: Any) -> Tensor:
        x: Tensor = gsd.pipeline(pipe, memory)(**arguments, decode=decode)
        return x

    return image


METHODS: dict[str, Callable[..., Tensor]] = {
    "the pipeline with gradients on": upstream,
    "the pipeline, enable_gradient_checkpointing": checkpointed,
    "store, decode store": ours("store", "store"),
    "checkpoint, decode blocks": ours("checkpoint", "blocks"),
    "revolve:2, decode blocks": ours("revolve:2", "blocks"),
    "checkpoint, decode halo": ours("checkpoint", "halo"),
}


def rewarded(table: Rows, sizes: tuple[int, ...], steps: int, small: bool) -> None:
    """A reward's gradient to the latents, through all steps and the decoder."""
    pipe, score = pipeline(small), reward()
    count = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    print(f"U-Net of {count:.1f} million parameters", flush=True)
    for size in sizes:
        expected = None
        for name, method in METHODS.items():
            arguments = call(size) | {"num_inference_steps": steps}
            with Live() as live:
                image = method(pipe, **arguments)
                loss = score(image).mean()
                del image
                (gradient,) = torch.autograd.grad(loss, arguments["latents"])
            expected = gradient if expected is None else expected
            error = float((gradient - expected).norm() / expected.norm())
            if not error < 1e-3:
                raise AssertionError(f"{name}: the gradient is {error:.1e} from upstream's")
            report(table, "pipeline", name, f"1x3x{size}x{size} N={steps}", live.peak)


def decoded(table: Rows, sizes: tuple[int, ...], small: bool) -> None:
    """A gradient through the decoder alone."""
    torch.manual_seed(0)
    network: Any = vae(8 if small else 16).eval().requires_grad_(False)
    network.tile_sample_min_size, network.tile_latent_min_size = TILE, TILE // 8
    for size in sizes:
        for memory in ("store", "blocks", "halo", "tiles"):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(1, 4, size // 8, size // 8, generator=generator).requires_grad_()
            with Live() as live:
                y = gsd.decode(network, x, memory=memory, tile=TILE)
                torch.autograd.grad(y.square().mean(), x)
                del y
            report(table, "decode", memory, f"1x3x{size}x{size}", live.peak)


def filmed(table: Rows, frames: tuple[int, ...], small: bool) -> None:
    """A gradient through the decoder of a video autoencoder, Wan's but narrower, by its frames."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    network: Any = AutoencoderKLWan(
        base_dim=4 if small else 16,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    network.eval().requires_grad_(False)
    side = 4 if small else 8  # of the latents, eight times as fine in the video
    for count in frames:
        for memory in ("store", "blocks", "frames"):
            generator = torch.Generator().manual_seed(0)
            shape = (1, 4, 1 + (count - 1) // 4, side, side)
            x = torch.randn(shape, generator=generator).requires_grad_()
            with Live() as live:
                y = gsd.decode(network, x, memory=memory)
                torch.autograd.grad(y.square().mean(), x)
                del y
            shape = f"1x3x{count}x{8 * side}x{8 * side}"
            report(table, "decode of a video", memory, shape, live.peak)


def report(table: Rows, op: str, name: str, shape: str, peak: int) -> None:
    values = (float(peak),) * 3
    table.append(rows.row(op, name, shape, "float32", "peak live tensors", "B", values))
    print(f"{op} {shape:20} {name:44} {peak / 2**20:9.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--only", choices=("rewards", "decodes", "videos"), help="one part alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    small, table = arguments.rehearse, Rows()
    if arguments.only in (None, "rewards"):
        rewarded(table, (64,) if small else SIZES, 2 if small else STEPS, small)
    if arguments.only in (None, "decodes"):
        decoded(table, (64,) if small else DECODED, small)
    if arguments.only in (None, "videos"):
        filmed(table, (5,) if small else FRAMES, small)
    if not small:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
