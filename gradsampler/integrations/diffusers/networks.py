# SPDX-License-Identifier: Apache-2.0
"""A network of diffusers as a denoiser for `gradsampler.sample`, read as its scheduler reads it."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.distributed.replication import Replicated, replicated
from gradsampler.parameterization import EDM, VP, Flow, Parameterization

__all__ = ["denoiser_from"]

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def summed(model: nn.Module) -> nn.Module:
    """The network; with diffusers' context parallelism, as `gradsampler.distributed.replicated`."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    return model if config is None else replicated(model, config._flattened_mesh.get_group())


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that `summed` was given."""
    return model.module if isinstance(model, Replicated) else model


def denoiser_from(
    model: nn.Module, scheduler: Any, *, time_scale: float | None = None
) -> Parameterization:
    """A network of diffusers as a denoiser, by the configuration of its scheduler.

    It works with all solvers, levels and noises of this package, whereas `pipeline` uses the
    scheduler's. For guidance use `gradsampler.Guided`, for conditioning the ``cond`` of a run.

    Args:
        model: a network of `diffusers.models`, called with a state, a timestep by name and what
            ``cond`` holds. With context parallelism its gradients are summed over the ranks.
        scheduler: one with ``alphas_cumprod``, of EDM or of flow matching.
        time_scale: the number that a flow-matching network gets at time 1; None is the scheduler's
            ``num_train_timesteps``. FluxTransformer2DModel gets 1.

    Returns:
        A `VP`, `EDM` or `Flow`.

    Raises:
        TypeError, ValueError: if model or scheduler are none of these.
    """
    if not isinstance(model, nn.Module):
        _checks.fail_type("model", "be an nn.Module", model)
    model = summed(model)
    config = getattr(scheduler, "config", {})
    name, prediction = type(scheduler).__name__, config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or prediction == "flow_prediction":
        scale = float(config.get("num_train_timesteps", 1000)) if time_scale is None else time_scale
        return Flow(_called(model, scale), modules=[model])
    if time_scale is not None:
        _checks.fail(
            "time_scale", f"be None for {name}, which is none of flow matching", time_scale
        )
    if name.startswith("EDM") and prediction == "epsilon":
        return EDM(_called(model), float(config["sigma_data"]), modules=[model])
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor) or prediction not in _PREDICTIONS:
        what = f"{name} with prediction_type={prediction!r}"
        _checks.fail("scheduler", "have alphas_cumprod, or be of EDM or flow matching", what)
    return VP(_called(model), table, _PREDICTIONS[prediction], modules=[model])


def _called(model: nn.Module, scale: float = 1.0) -> Callable[..., Tensor]:
    """The network as a function of state, timestep and conditioning."""
    names = list(inspect.signature(unwrapped(model).forward).parameters)
    time = next((name for name in ("timestep", "timesteps", "t") if name in names), names[1])
    plain = {"return_dict": False} if "return_dict" in names else {}

    def network(x: Tensor, level: Tensor, **cond: Any) -> Tensor:
        result = model(x, **{time: scale * level}, **plain, **cond)
        output: Tensor = result if isinstance(result, Tensor) else result[0]
        return output

    return network
