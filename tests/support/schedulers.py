# SPDX-License-Identifier: Apache-2.0
"""Every scheduler of diffusers that has a step, with what a short loop of it takes."""

import functools
import importlib
import inspect
import pkgutil
from dataclasses import dataclass, field
from typing import Any

import torch

from support.pipelines import BETAS, bare, diffusers

STATE = (2, 4, 8, 8)


@dataclass(frozen=True)
class Setup:
    """How a scheduler is built and stepped."""

    options: dict[str, Any] = field(default_factory=dict)  # of the scheduler
    steps: int = 5
    call: dict[str, Any] = field(default_factory=dict)  # of the loop
    network: dict[str, Any] = field(default_factory=dict)
    state: tuple[int, ...] = STATE
    affine: bool = True

    def text(self) -> str:
        """What sets it apart from the scheduler's defaults."""
        settings = {k: v for k, v in self.options.items() if k not in BETAS}
        settings |= {k: v for k, v in self.call.items() if isinstance(v, float)}
        return ", ".join(f"`{name}={value}`" for name, value in settings.items())


@functools.cache
def classes() -> dict[str, Any]:
    """The classes by their names."""
    found = {}
    assert diffusers.SchedulerMixin
    package = importlib.import_module("diffusers.schedulers")
    for info in pkgutil.walk_packages(package.__path__, "diffusers.schedulers."):
        if "flax" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name, each in vars(module).items():
            own = inspect.isclass(each) and each.__module__ == info.name
            if own and name.endswith("Scheduler") and hasattr(each, "step"):
                found[name] = each
    return found


def _image() -> torch.Tensor:
    return torch.randn(STATE, generator=torch.Generator().manual_seed(11))


def _mask() -> torch.Tensor:
    return (_image() > 0).float()


BY_BETAS = Setup(dict(BETAS))

SETUPS: dict[str, list[Setup]] = {
    "CMStochasticIterativeScheduler": [
        Setup(affine=False),  # clips the prediction by default
        Setup({"clip_denoised": False}),
    ],
    "CogVideoXDDIMScheduler": [BY_BETAS],
    "CogVideoXDPMScheduler": [BY_BETAS],
    "ConsistencyDecoderScheduler": [Setup(steps=2)],
    "CosineDPMSolverMultistepScheduler": [Setup(affine=False)],  # Brownian
    "DDIMInverseScheduler": [Setup({"clip_sample": False})],
    "DDIMParallelScheduler": [Setup({"clip_sample": False})],
    "DDIMScheduler": [
        Setup(affine=False),  # clips the prediction by default
        Setup({"clip_sample": False}, call={"eta": 1.0}),
    ],
    "DDPMParallelScheduler": [Setup({"clip_sample": False})],
    "DDPMScheduler": [
        Setup(affine=False),  # clips the prediction by default
        Setup({"clip_sample": False}),
        Setup({"variance_type": "learned_range"}, network={"out_channels": 8}, affine=False),
    ],
    "DDPMWuerstchenScheduler": [Setup(call={"last": -1, "spread": True})],
    "DEISMultistepScheduler": [BY_BETAS],
    "DPMSolverMultistepInverseScheduler": [BY_BETAS],
    "DPMSolverMultistepScheduler": [
        BY_BETAS,
        Setup(BETAS | {"algorithm_type": "sde-dpmsolver++"}),
        Setup(BETAS | {"thresholding": True}, affine=False),
    ],
    "DPMSolverSDEScheduler": [Setup(dict(BETAS), affine=False)],  # Brownian
    "DPMSolverSinglestepScheduler": [
        Setup({k: v for k, v in BETAS.items() if k != "steps_offset"}),
    ],
    "EDMDPMSolverMultistepScheduler": [Setup()],
    "EDMEulerScheduler": [Setup()],
    "EulerAncestralDiscreteScheduler": [BY_BETAS],
    "EulerDiscreteScheduler": [BY_BETAS, Setup(dict(BETAS), call={"s_churn": 2.0})],
    "FlowMapEulerDiscreteScheduler": [Setup()],
    "FlowMatchEulerDiscreteScheduler": [Setup(), Setup({"stochastic_sampling": True})],
    "FlowMatchHeunDiscreteScheduler": [Setup()],
    "FlowMatchLCMScheduler": [Setup()],
    "HeliosDMDScheduler": [
        Setup(
            {"stages": 1, "stage_range": [0, 1], "gamma": 1 / 3},
            network={"tokens": True},
            state=(2, 4, 2, 4, 4),
        )
    ],
    "HeliosScheduler": [Setup({"stages": 1, "stage_range": [0, 1], "gamma": 1 / 3})],
    "HeunDiscreteScheduler": [BY_BETAS],
    "IPNDMScheduler": [Setup()],
    "KDPM2AncestralDiscreteScheduler": [BY_BETAS],
    "KDPM2DiscreteScheduler": [BY_BETAS],
    "KarrasVeScheduler": [Setup(steps=3, affine=False)],  # it has a step of two calls
    "LCMScheduler": [BY_BETAS],
    "LMSDiscreteScheduler": [BY_BETAS],
    "LTXEulerAncestralRFScheduler": [Setup()],
    "MiniMaxH3Scheduler": [Setup()],
    "PNDMScheduler": [BY_BETAS, Setup(BETAS | {"skip_prk_steps": True})],
    "PiflowScheduler": [
        Setup(
            {"n_grid": 3},
            network={"out_channels": 12, "tokens": True},
            state=(2, 16, 4),
            steps=2,
            affine=False,
        )
    ],
    "RFD4ProteinaScheduler": [
        Setup(
            {
                "schedule_mode": "log",
                "noise_mode": "1/t",
                "tsr_k": 2.0,
                "tsr_sigma": 0.5,
                "tail_steps": 0,
            },
            network={"tokens": True},
            state=(1, 16, 4),
            call={"emit_mask": torch.arange(16)[None] > 2},
            affine=False,  # by position
        )
    ],
    "RePaintScheduler": [
        Setup(
            {"clip_sample": False}, call={"original_image": _image(), "mask": _mask()}, affine=False
        )
    ],
    "SASolverScheduler": [BY_BETAS],
    "SCMScheduler": [Setup(steps=2, call={"last": -1})],
    "TCDScheduler": [BY_BETAS],
    "UnCLIPScheduler": [Setup({"clip_sample": False})],
    "UniPCMultistepScheduler": [BY_BETAS, Setup(BETAS | {"solver_order": 3})],
}

# Those whose levels can be given, if they are affine.
LEVELS = (
    "CMStochasticIterativeScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)

TOKENS = "its states are tokens, which have no gradient"
OTHER = {  # why there is no gradient
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "VQDiffusionScheduler": TOKENS,
}


def leveled() -> list[tuple[str, int]]:
    """The setups whose levels can be given, by name and place."""
    return [(name, k) for name in LEVELS for k, setup in enumerate(SETUPS[name]) if setup.affine]


def pipeline(kind: type, setup: Setup) -> Any:
    """A bare loop of the scheduler."""
    return bare(kind(**setup.options), **setup.network)


def arguments(setup: Setup) -> dict[str, Any]:
    """Of a call of the loop, with new generators of the same seed."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(setup.state, generator=generator).requires_grad_()
    return {
        "latents": latents,
        "num_inference_steps": setup.steps,
        "generator": torch.Generator().manual_seed(1),
        **setup.call,
    }
