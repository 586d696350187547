# SPDX-License-Identifier: Apache-2.0
"""The shipped digits network as a diffusers pipeline, to try things out without a download."""

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks, models
from gradsampler.models import NULL_CLASS, DigitsNetwork, to_pixels
from gradsampler.parameterization import EDM

__all__ = ["DigitsDenoiser", "digits"]

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_HIGHEST = 80.0  # noise level that the network was trained for


class DigitsDenoiser(nn.Module):
    """The digits network as a pipeline calls networks: with a state, a timestep and labels.

    Args:
        network: the raw network of an EDM preconditioning.
        alphas_cumprod: [T] of a scheduler that asks for the noise in states of unit variance; None
            for one of flow matching, which asks for the velocity, with timesteps in 0..1000.
    """

    log_sigmas: Tensor | None

    def __init__(self, network: DigitsNetwork, alphas_cumprod: Tensor | None) -> None:
        super().__init__()
        self.network = network
        kept = alphas_cumprod
        table = None if kept is None else 0.5 * torch.log((1 - kept) / kept)
        self.register_buffer("log_sigmas", table, persistent=False)
        self.config = SimpleNamespace(in_channels=1, out_channels=1, sample_size=8)

    @property
    def device(self) -> torch.device:
        """Of the parameters, which pipelines ask for."""
        return next(self.parameters()).device

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The prediction [B, 1, 8, 8] for a state of that shape and labels [B] in 0..10."""
        if self.log_sigmas is None:
            time = timestep.to(torch.float32) / 1000
            sigma = (time / (1 - time)).clamp_max(_HIGHEST)
            alpha, level = 1 / (1 + sigma), sigma / (1 + sigma)
        else:
            below = timestep.to(torch.float32).floor()
            ends = self.log_sigmas[below.long()], self.log_sigmas[timestep.ceil().long()]
            sigma = torch.lerp(*ends, timestep - below).exp()
            alpha, level = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
        denoiser = EDM(self.network, self.network.sigma_data)
        clean = denoiser(sample / alpha, sigma.expand(len(sample)), label=class_labels)
        if self.log_sigmas is None:
            return (sample - clean) / level
        return (sample - alpha * clean) / level


@functools.cache
def _kind() -> Any:
    """The class of the pipeline, made when diffusers is needed."""
    diffusers: Any = importlib.import_module("diffusers")
    randn_tensor: Any = importlib.import_module("diffusers.utils.torch_utils").randn_tensor
    base: Any = diffusers.DiffusionPipeline

    class DigitsPipeline(base):
        """Handwritten digits by their labels, with classifier-free guidance."""

        def __init__(self, denoiser: nn.Module, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(denoiser=denoiser, scheduler=scheduler)

        @torch.no_grad()
        def __call__(
            self,
            label: Tensor,
            num_inference_steps: int = 20,
            guidance_scale: float | Tensor = 1.0,
            generator: Any = None,
            latents: Tensor | None = None,
            output_type: str = "pt",
            return_dict: bool = True,
        ) -> Any:
            shape = (len(label), 1, 8, 8)
            if latents is None:
                latents = randn_tensor(shape, generator=generator, device=self.device)
            label = label.to(self.device)
            self.scheduler.set_timesteps(num_inference_steps, device=self.device)
            latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
            with self.progress_bar(total=len(self.scheduler.timesteps)) as progress_bar:
                for t in self.scheduler.timesteps:
                    x = latents
                    if hasattr(self.scheduler, "scale_model_input"):
                        x = self.scheduler.scale_model_input(x, t)
                    output = self.denoiser(x, t, label)
                    if guidance_scale != 1:
                        free = self.denoiser(x, t, torch.full_like(label, NULL_CLASS))
                        output = free + guidance_scale * (output - free)
                    latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
                    progress_bar.update()
            if output_type != "latent":
                latents = to_pixels(latents)
            if not return_dict:
                return (latents,)
            return diffusers.ImagePipelineOutput(images=latents)

    return DigitsPipeline


def digits(scheduler: Any = None) -> Any:
    """A diffusers pipeline of handwritten digits, whose network ships with the package.

    Call it as ``pipe(label, num_inference_steps=20, guidance_scale=1.0, generator=None,
    latents=None, output_type="pt")`` with labels [B] in 0..9. It returns images [B, 1, 8, 8] in
    [0, 1], or states in [-1, 1] with ``output_type="latent"``.

    Args:
        scheduler: of `diffusers`, for a network that predicts the noise, or of flow matching; None
            is `DDIMScheduler`.

    Returns:
        A `diffusers.DiffusionPipeline`, its network frozen and in evaluation mode.

    Raises:
        ValueError: where the scheduler asks for another prediction.
    """
    if scheduler is None:
        kind: Any = importlib.import_module("diffusers").DDIMScheduler
        scheduler = kind(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction not in ("epsilon", "flow_prediction"):
        _checks.fail("scheduler", "ask for epsilon or for the velocity of a flow", prediction)
    table = scheduler.alphas_cumprod if prediction == "epsilon" else None
    denoiser = DigitsDenoiser(models.load_network(), table)
    pipe = _kind()(denoiser.eval().requires_grad_(False), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
