# SPDX-License-Identifier: Apache-2.0
"""A custom pipeline around a small network; importing it imports diffusers."""

import inspect
from typing import Any

import torch
from torch import Tensor

from support.pipelines import diffusers


class Bare(diffusers.DiffusionPipeline):
    """The loop that a scheduler's documentation shows, as a pipeline of a class of its own."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        num_inference_steps: int = 5,
        generator: Any = None,
        output_type: str = "latent",
        return_dict: bool = True,
        last: int | None = None,
        spread: bool = False,
        **options: Any,
    ) -> Any:
        parameters = inspect.signature(self.scheduler.step).parameters
        if "generator" in parameters:
            options["generator"] = generator
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps[:last]
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        if "dmd_noisy_tensor" in parameters:  # of the stage's start; Helios's timesteps are its own
            options["dmd_noisy_tensor"], options["all_timesteps"] = latents, timesteps
            options["dmd_timesteps"] = self.scheduler.timesteps
            options["dmd_sigmas"] = self.scheduler.sigmas
        previous = None
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                x = latents
                if spread:  # a timestep for each sample
                    t = t.expand(len(x))
                if hasattr(self.scheduler, "scale_model_input"):
                    x = self.scheduler.scale_model_input(x, t)
                output = self.unet(x, timesteps[i])
                if "old_pred_original_sample" in parameters:
                    back = timesteps[i - 1] if i > 0 else None
                    latents, previous = self.scheduler.step(
                        output, previous, t, back, latents, **options, return_dict=False
                    )
                else:
                    if "cur_sampling_step" in parameters:
                        options["cur_sampling_step"] = i
                    latents = self.scheduler.step(output, t, latents, **options, return_dict=False)[
                        0
                    ]
                progress_bar.update()
        return (latents,) if not return_dict else {"latents": latents}


class Corrected(Bare):
    """Algorithm 2 of Karras et al. 2022 as in KarrasVePipeline, without its images."""

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        num_inference_steps: int = 5,
        generator: Any = None,
        output_type: str = "latent",
        return_dict: bool = True,
    ) -> Any:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        x = latents * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            sigma = scheduler.schedule[t]
            following = scheduler.schedule[t - 1] if t > 0 else 0
            hat, sigma_hat = scheduler.add_noise_to_input(x, sigma, generator=generator)
            output = self.unet(hat, sigma_hat)
            found = scheduler.step(output, sigma_hat, following, hat)
            if following != 0:
                output = self.unet(found.prev_sample, following)
                found = scheduler.step_correct(
                    output, sigma_hat, following, hat, found.prev_sample, found.derivative
                )
            x = found.prev_sample
        return (x,) if not return_dict else {"latents": x}


class Small(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A smooth network of a state and a timestep: of [B, C, H, W], or of tokens [B, L, C]."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, in_channels: int = 4, out_channels: int = 4, tokens: bool = False) -> None:
        super().__init__()
        self.first: torch.nn.Module
        self.last: torch.nn.Module
        if tokens:
            self.first = torch.nn.Linear(in_channels, 8)
            self.last = torch.nn.Linear(8, out_channels)
        else:
            self.first = torch.nn.Conv2d(in_channels, 8, 3, padding=1)
            self.last = torch.nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        hidden = torch.tanh(self.first(x) + torch.sin(0.01 * torch.as_tensor(t).to(x)))
        output: Tensor = self.last(hidden)
        return output
