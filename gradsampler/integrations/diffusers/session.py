# SPDX-License-Identifier: Apache-2.0
"""One call of a pipeline, on private copies of the pipeline and of its scheduler."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsampler import _checks
from gradsampler.engine.agreement import Agreement
from gradsampler.engine.recomputation import recomputed
from gradsampler.engine.substitution import stand_in, subclass
from gradsampler.engine.wrapper import Wrapper
from gradsampler.integrations.diffusers import decoding, parts
from gradsampler.integrations.diffusers.glue import Glue, Lifted
from gradsampler.integrations.diffusers.loop import own_call
from gradsampler.integrations.diffusers.networks import summed

__all__ = ["Bar", "Outputs", "Session", "lifted"]

Model = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Outputs(tuple[Tensor]):
    """What a model returns, read by position or by name."""

    @property
    def sample(self) -> Tensor:
        """The first output."""
        return self[0]


class Bar:
    """The pipeline's progress bar, which a turn that is made again does not move."""

    def __init__(self, bar: Any, session: "Session") -> None:
        self._bar, self._session = bar, session

    def __iter__(self) -> Iterator[Any]:
        for item in self._bar.iterable:
            yield item
            self.update()

    def __len__(self) -> int:
        return len(self._bar)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: float = 1) -> None:
        """Moves the bar on."""
        if self._session.live:
            self._bar.update(n)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class Session:
    """A pipeline whose models, scheduler and progress bar are watched, for one call.

    Args:
        pipe: the user's pipeline, which stays as it is.
        arguments: of the call.
        levels: what ``scheduler.sigmas`` is to hold once the timesteps are set.
        decode: what the autoencoder keeps where images are asked for, one of `decoding.MEMORIES`.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        levels: Tensor | None = None,
        decode: str = "auto",
    ) -> None:
        self.call = own_call(pipe)
        self.glue = Glue()
        self.reached = -1  # the furthest turn that was run
        self.live = True  # whether what runs is the sampling and not a repetition
        self.model: Model = lambda module, args, kwargs: module(*args, **kwargs)
        self.step: Callable[..., Any] | None = None
        self.last: Any = None  # what the scheduler's last step returned
        self._given, self._levels, self._original = arguments, levels, pipe
        self._decode = _checks.choice("decode", decode, decoding.MEMORIES)
        self.arguments, self._start = self._adapted(arguments)
        self.pipe = copy.copy(pipe)
        self._swapped = {
            name: twin
            for name, part in vars(pipe).items()
            if (twin := self._twin(name, part)) is not None
        }
        self.pipe.__dict__.update(self._swapped)
        self.pipe.__dict__["progress_bar"] = self._progress_bar
        self.pipe.__dict__["maybe_free_model_hooks"] = lambda: None
        self._networks = {
            id(part): summed(part) for part in vars(pipe).values() if isinstance(part, nn.Module)
        }
        self.bars: list[Bar] = []
        self.drawn: list[Tensor] = []  # before the loop

    def _adapted(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments for the pipeline, and latents that it has no argument for."""
        known = inspect.signature(self.call).parameters
        given = {name: lifted(x) for name, x in arguments.items()}
        start = given.pop("latents", None) if "latents" not in known else None
        decoded = "output_type" in given and given["output_type"] != "latent"
        if "output_type" in known and given.get("output_type") in ("pil", "np"):
            _checks.fail(
                "output_type", 'be "latent" or "pt", which carry a gradient', given["output_type"]
            )
        has_latent = '"latent"' in inspect.getsource(self.call)
        self.wants_tail = decoded or has_latent
        if "output_type" in known and not decoded:
            given["output_type"] = "latent" if has_latent else "pt"
        if "return_dict" in known:
            given["return_dict"] = False
        return given, start

    def _twin(self, name: str, part: Any) -> Any:
        if isinstance(part, nn.Module):
            if name == "vae" and hasattr(part, "decode"):
                return self._autoencoder(part)
            return stand_in(part, self._aside if _is_encoder(part) else self._called)
        if hasattr(part, "step") and hasattr(part, "set_timesteps"):
            hooks = {"step": self._stepped, "set_timesteps": self._set}
            return parts.overridden(parts.copied(part), hooks)
        return None

    def anew(self) -> "Session":
        """Another session of the same call."""
        return Session(self._original, self._given, self._levels, self._decode)

    @property
    def modules(self) -> list[nn.Module]:
        """The user's modules that a turn may call."""
        return [part for part in self._networks.values() if not _is_encoder(part)]

    @property
    def agreement(self) -> Agreement:
        """With the ranks that compute a network together, as they make the same calls."""
        shared = [part for part in self.modules if isinstance(part, Wrapper)]
        return Agreement([group for part in shared for group in part.groups()])

    @property
    def name(self) -> str:
        """The class of the pipeline."""
        return type(self._original).__name__

    def _autoencoder(self, vae: nn.Module) -> nn.Module:
        """The autoencoder with a decoder in bounded memory."""

        def decode(_: nn.Module, latents: Tensor, *args: Any, **kwargs: Any) -> Outputs:
            with self.glue.paused():
                return Outputs(
                    (decoding.decode(vae, latents, *args, memory=self._decode, **kwargs),)
                )

        twin: nn.Module = object.__new__(subclass(type(vae), {"decode": decode}))
        object.__setattr__(twin, "__dict__", vae.__dict__)
        return twin

    @property
    def scheduler(self) -> Any:
        """The private scheduler, whose steps are watched."""
        return self.pipe.__dict__["scheduler"]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipe.__dict__["scheduler"] = scheduler

    @property
    def decodes(self) -> Any:
        """The autoencoder that ends the call, or None where it ends with latents."""
        latent = self.arguments.get("output_type", "latent") == "latent"
        return None if latent else getattr(self._original, "vae", None)

    @property
    def offloaded(self) -> bool:
        """Whether models come to the device for their call alone (enable_model_cpu_offload).

        A backward that read their weights afterwards would find them elsewhere.
        """
        return bool(getattr(self._original, "_all_hooks", ()))

    def _aside(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.glue.paused():
            if self.offloaded:
                return recomputed(module, args, kwargs, name=type(module).__name__)
            return module(*args, **kwargs)

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.glue.paused():
            return self.model(self._networks[id(module)], args, kwargs)

    def _stepped(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.last = own(*args, **kwargs) if self.step is None else self.step(own, *args, **kwargs)
        return self.last

    def _set(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        if self._levels is not None:
            (scheduler,) = own.args  # type: ignore[attr-defined]
            _set_levels(scheduler, self._levels)

    def _progress_bar(self, iterable: Any = None, total: int | None = None) -> Bar:
        bar = type(self._original).progress_bar(self._original, iterable, total)
        self.bars.append(Bar(bar, self))
        return self.bars[-1]

    def started(self, shape: tuple[int, ...], kwargs: dict[str, Any]) -> Tensor:
        """A draw before the loop: the caller's latents where the pipeline has no argument for them.

        With a list of generators a pipeline draws its samples one by one.
        """
        if self._start is None:
            self.drawn.append(torch.randn(shape, **kwargs))
            return self.drawn[-1]
        start = _checks.floating("latents", self._start)
        one = (1, *start.shape[1:])
        if shape == one and len(start) > 1:
            start, self._start = start[:1], start[1:]
        else:
            self._start = None
        _checks.shape("latents", start, shape)
        return start.to(kwargs.get("device"), kwargs.get("dtype") or start.dtype)

    def noise(self, elements: int) -> Tensor | None:
        """The standard normal noise of that many elements that the run begins with, if it is seen.

        It is what the caller gave for latents, or what was drawn before the loop.
        """
        given = self._given.get("latents")
        if isinstance(given, Tensor):
            return given if given.numel() == elements else None
        for count in range(1, len(self.drawn) + 1):
            if sum(x.numel() for x in self.drawn[:count]) == elements:
                first = self.drawn[0]
                whole = all(x.shape == first.shape for x in self.drawn[:count])
                return torch.cat(self.drawn[:count]) if whole else None
        return None

    @property
    def starts_from_noise(self) -> bool:
        """Whether the first state is noise alone, which it is not in image-to-image pipelines."""
        return "strength" not in inspect.signature(self.call).parameters

    def scale(self, start: Tensor) -> float:
        """What standard normal noise was multiplied by to give the first state.

        1 where the run does not start from noise.
        """
        if not self.starts_from_noise:
            return 1.0
        noise = self.noise(start.numel())
        if noise is None:
            own = getattr(self.scheduler, "init_noise_sigma", 1.0)
            return float(torch.as_tensor(own).detach())
        sizes = [float(x.detach().double().norm()) for x in (start, noise)]
        return sizes[0] / sizes[1] if sizes[0] and sizes[1] else 1.0

    def z0(self, start: Tensor) -> Tensor:
        """The standard normal noise that a run from the state ``start`` begins with."""
        scale = self.scale(start)
        return start if scale == 1.0 else start / scale

    def carrying(self, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The local variables and the pipeline's attributes through which a gradient passes."""
        own = {name: x for name, x in vars(self.pipe).items() if name not in self._swapped}
        return {
            kind: {name: _plain(x) for name, x in values.items() if _carries(x)}
            for kind, values in (("names", names), ("attributes", own))
        }

    def put(self, attributes: Mapping[str, Any]) -> None:
        """Sets attributes of the private pipeline."""
        self.pipe.__dict__.update({name: lifted(x) for name, x in attributes.items()})

    def advance(self, turn: int) -> None:
        """Moves the bars on, where the pipeline's own code does not get to it.

        A turn that is run again does not.
        """
        if turn <= self.reached:
            return
        self.reached = turn
        for bar in self.bars:
            if bar.total is None or bar.n < bar.total:
                bar.update()

    def close(self) -> None:
        """Leaves the user's pipeline as its own call would have left it."""
        for bar in self.bars:
            bar.close()
        kept = {*self._swapped, "progress_bar", "maybe_free_model_hooks"}
        changed = {k: v for k, v in vars(self.pipe).items() if k not in kept}
        self._original.__dict__.update(changed)
        if not (self.offloaded and torch.is_grad_enabled()):  # or the last model left its device
            self._original.maybe_free_model_hooks()

    def result(self, returned: Any) -> Any:
        """What the run gives: the pipeline's latents, or with ``output_type="pt"`` its images."""
        if not self.wants_tail:
            return self.last[0]
        tensors = [x for x in returned if isinstance(x, Tensor)]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _set_levels(scheduler: Any, levels: Tensor) -> None:
    """Puts the caller's levels in the place of a scheduler's own."""
    own = getattr(scheduler, "sigmas", None)
    name = type(scheduler).__name__
    if not isinstance(own, Tensor):
        _checks.fail("levels", "be None for a scheduler without a table of sigmas", name)
    derived = [k for k, v in vars(scheduler).items() if k.startswith("sigmas_") and v is not None]
    if derived:
        _checks.fail(
            "levels", f"be None for {name}, whose {derived[0]} follow from its own", "some"
        )
    _checks.shape(f"levels of {name}", _checks.floating("levels", levels), own.shape)
    if bool((levels < 0).any()) or not bool(torch.isfinite(levels).all()):
        _checks.fail("levels", "be finite and at least 0", levels.tolist())
    scheduler.sigmas = levels.to(own.device)


def _is_encoder(part: nn.Module) -> bool:
    """Whether a module is of transformers: a pipeline calls these before its loop alone."""
    return any(each.__module__.split(".")[0] == "transformers" for each in type(part).__mro__)


def lifted(x: Any) -> Any:
    """A number that requires grad in a form that every torch function takes; else x."""
    number = isinstance(x, Tensor) and x.ndim == 0 and x.requires_grad
    return Lifted.of(x) if number and not isinstance(x, Lifted) else x


def _plain(x: Any) -> Any:
    return pytree.tree_map_only(Lifted, lambda number: number.origin, x)


def _carries(x: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(x))
