# SPDX-License-Identifier: Apache-2.0
"""Tiny random diffusers pipelines, one of each architecture, and the arguments of a short call."""

import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Late:
    """The package diffusers, imported where it is first used: that takes seconds."""

    def __getattr__(self, name: str) -> Any:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module("diffusers"), name)


diffusers: Any = _Late()

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,  # or Stable Diffusion warns
}


def unet(**changes: Any) -> Any:
    """A text-conditioned U-Net of 8x8 latents."""
    sizes = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return diffusers.UNet2DConditionModel(**(sizes | changes))


def vae(**changes: Any) -> Any:
    """An image decoder of latents with four channels, which doubles the size."""
    sizes = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**(sizes | changes))


def quiet(pipe: Any) -> Any:
    """The pipeline without a progress bar, its models in evaluation mode."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def stable_diffusion(scheduler: Any = None, **changes: Any) -> Any:
    """Stable Diffusion with a decoder and without a text encoder."""
    torch.manual_seed(0)
    scheduler = scheduler or diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    return quiet(
        diffusers.StableDiffusionPipeline(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet(**changes),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def _sd15() -> Any:
    return stable_diffusion(diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True))


def _sd21() -> Any:
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    return stable_diffusion(scheduler, use_linear_projection=True)


def _turbo() -> Any:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    return stable_diffusion(scheduler)


def _lcm() -> Any:
    torch.manual_seed(0)
    return quiet(
        diffusers.LatentConsistencyModelPipeline(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet(time_cond_proj_dim=16),
            scheduler=diffusers.LCMScheduler(**BETAS),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def _sdxl() -> Any:
    torch.manual_seed(0)
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        use_linear_projection=True,
    )
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=network,
            scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
            add_watermarker=False,
        )
    )


def _sd3() -> Any:
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    encoders = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3")
    )
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=network,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            tokenizer_3=None,
            **encoders,
        )
    )


def _flux() -> Any:
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return quiet(
        diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=network,
        )
    )


def _pixart() -> Any:
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=8,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return quiet(
        diffusers.PixArtAlphaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=network,
            scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS),
        )
    )


def _wan() -> Any:
    torch.manual_seed(0)

    def network() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=16,
        )

    return quiet(
        diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=network(),
            transformer_2=network(),
            boundary_ratio=0.8,
        )
    )


def _cogvideox() -> Any:
    torch.manual_seed(0)
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
    )
    return quiet(
        diffusers.CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=network,
            scheduler=diffusers.CogVideoXDPMScheduler(**BETAS, clip_sample=False),
        )
    )


def _ltx() -> Any:
    torch.manual_seed(0)
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    return quiet(
        diffusers.LTXPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=network,
        )
    )


def _cosmos_network() -> Any:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # which needs torchvision
        extra_pos_embed_type="learnable",
    )


@functools.cache
def _unchecked() -> Any:
    """In the place of the package cosmos_guardrail, which is not installed."""

    class Unchecked(diffusers.ModelMixin, diffusers.ConfigMixin):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def check_text_safety(self, prompt: str) -> bool:
            return True

    return Unchecked()


def _cosmos() -> Any:
    torch.manual_seed(0)
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    return quiet(
        diffusers.CosmosTextToWorldPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=_cosmos_network(),
            vae=None,
            scheduler=scheduler,
            safety_checker=_unchecked(),
        )
    )


def _cosmos2() -> Any:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return quiet(
        diffusers.Cosmos2TextToImagePipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=_cosmos_network(),
            vae=None,
            scheduler=scheduler,
            safety_checker=_unchecked(),
        )
    )


def _unconditional(kind: str, scheduler: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
            attention_head_dim=4,
        )
        return quiet(getattr(diffusers, kind)(unet=network, scheduler=scheduler()))

    return build


@dataclass(frozen=True)
class Case:
    """A pipeline and a call of it."""

    build: Callable[[], Any]
    shapes: dict[str, tuple[int, ...]]  # of the tensors that it is differentiated by
    plain: dict[str, Any]  # arguments beside them; "guidance_scale" becomes a tensor
    method: str  # the way that it goes

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Random arguments; the floating tensors require grad."""
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Any] = {
            name: torch.randn(shape, generator=generator).requires_grad_()
            for name, shape in self.shapes.items()
        }
        for name, value in self.plain.items():
            scale = name in ("guidance_scale", "true_cfg_scale")
            given[name] = torch.tensor(value, requires_grad=True) if scale else value
        return given | {"generator": torch.Generator().manual_seed(7)}


def leaves(pipe: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a call is differentiated by: its tensors, and the parameters of its denoisers."""
    named = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    for name in ("unet", "transformer", "transformer_2"):
        network = getattr(pipe, name, None)
        if network is not None:
            named |= {f"{name}.{k}": p for k, p in network.named_parameters()}
    return named


def own(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """The pipeline's latents by its own code, without the no_grad around it."""
    call = inspect.unwrap(type(pipe).__call__)
    if "latents" not in inspect.signature(call).parameters:
        return _unconditional_loop(pipe, **arguments)
    latents: Tensor = call(pipe, **arguments, output_type="latent", return_dict=False)[0]
    return latents


def _unconditional_loop(
    pipe: Any,
    latents: Tensor,
    num_inference_steps: int,
    generator: Any,
    batch_size: int,
    **options: Any,
) -> Tensor:
    """The loop of DDPMPipeline and DDIMPipeline, which take no latents."""
    assert len(latents) == batch_size
    pipe.scheduler.set_timesteps(num_inference_steps)
    x = latents
    for t in pipe.scheduler.timesteps:
        output = pipe.unet(x, t).sample
        x = pipe.scheduler.step(output, t, x, generator=generator, **options).prev_sample
    return x


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance."""
    return float((a - b).detach().norm() / b.detach().norm())


TEXT = {"prompt_embeds": (1, 5, 8), "negative_prompt_embeds": (1, 5, 8)}
LATENTS = {"latents": (1, 4, 8, 8)}
POOLED = {"pooled_prompt_embeds": (1, 8), "negative_pooled_prompt_embeds": (1, 8)}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
}
GUIDED = {"guidance_scale": 4.0}

CASES = {
    "ddpm": Case(
        _unconditional("DDPMPipeline", lambda: diffusers.DDPMScheduler(clip_sample=False)),
        {"latents": (2, 3, 8, 8)},
        {"batch_size": 2, "num_inference_steps": 4},
        "program",
    ),
    "ddim": Case(
        _unconditional("DDIMPipeline", lambda: diffusers.DDIMScheduler()),  # clamps the prediction
        {"latents": (2, 3, 8, 8)},
        {"batch_size": 2, "num_inference_steps": 4, "eta": 0.5},
        "steps",
    ),
    "sd15": Case(_sd15, TEXT | LATENTS, GUIDED | {"num_inference_steps": 5}, "program"),
    "sd21": Case(
        _sd21,
        TEXT | LATENTS,
        GUIDED | {"num_inference_steps": 4, "guidance_rescale": 0.7, "eta": 0.3},
        "program",
    ),
    "sdxl": Case(
        _sdxl,
        TEXT | POOLED | LATENTS,
        GUIDED | {"num_inference_steps": 4, "height": 16, "width": 16},
        "program",
    ),
    "sd3": Case(_sd3, TEXT | POOLED | LATENTS, GUIDED | {"num_inference_steps": 4}, "program"),
    "flux": Case(
        _flux,
        TEXT | POOLED | {"latents": (1, 4, 16)},
        {
            "guidance_scale": 3.5,
            "true_cfg_scale": 2.0,
            "num_inference_steps": 4,
            "height": 8,
            "width": 8,
        },
        "program",
    ),
    "pixart": Case(
        _pixart,
        TEXT | LATENTS,
        GUIDED
        | MASKS
        | {
            "num_inference_steps": 4,
            "height": 16,
            "width": 16,
            "use_resolution_binning": False,
            "negative_prompt": None,
        },
        "program",
    ),
    "wan": Case(
        _wan,
        TEXT | {"latents": (1, 4, 2, 4, 4)},
        GUIDED
        | {"guidance_scale_2": 2.0, "num_inference_steps": 4, "height": 32, "width": 32}
        | {"num_frames": 5},
        "program",
    ),
    "cogvideox": Case(
        _cogvideox,
        TEXT | {"latents": (1, 2, 4, 4, 4)},
        GUIDED
        | {"num_inference_steps": 4, "height": 32, "width": 32, "num_frames": 5}
        | {"max_sequence_length": 5},
        "program",
    ),
    "ltx": Case(
        _ltx,
        TEXT | {"latents": (1, 8, 4)},
        GUIDED
        | MASKS
        | {"num_inference_steps": 4, "height": 64, "width": 64, "num_frames": 9}
        | {"max_sequence_length": 5},
        "program",
    ),
    "cosmos": Case(
        _cosmos,
        TEXT | {"latents": (1, 4, 2, 4, 4)},
        GUIDED | {"num_inference_steps": 4, "height": 32, "width": 32, "num_frames": 9},
        "program",
    ),
    "cosmos2": Case(
        _cosmos2,
        TEXT | {"latents": (1, 4, 1, 4, 4)},
        GUIDED | {"num_inference_steps": 4, "height": 32, "width": 32},
        "program",
    ),
    "lcm": Case(
        _lcm,
        {"prompt_embeds": (1, 5, 8)} | LATENTS,
        {"guidance_scale": 8.5, "num_inference_steps": 3},
        "program",
    ),
    "turbo": Case(
        _turbo,
        {"prompt_embeds": (1, 5, 8)} | LATENTS,
        {"guidance_scale": 0.0, "num_inference_steps": 1},
        "program",
    ),
}


def bare(scheduler: Any, **sizes: Any) -> Any:
    """A bare loop of a small network."""
    from support import loop  # defines subclasses of diffusers

    torch.manual_seed(0)
    kind = loop.Corrected if hasattr(scheduler, "step_correct") else loop.Bare
    return quiet(kind(loop.Small(**sizes), scheduler))
