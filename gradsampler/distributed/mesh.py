# SPDX-License-Identifier: Apache-2.0
"""A state that lies on a mesh of devices, a DTensor, run by the part that each rank holds.

The stages of a program act element by element, so each rank carries them out on its own part, with
the step noise that the global index names. The network is called with DTensors. What is a sum over
elements, as the gradient of a coefficient is, is a sum over the ranks as well.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradsampler import _checks
from gradsampler.coordinates import Coordinates
from gradsampler.elementary import Coefficient
from gradsampler.engine.agreement import Agreement
from gradsampler.engine.observer import StepInfo
from gradsampler.engine.program import Program
from gradsampler.engine.wrapper import Wrapper
from gradsampler.noise import Given, NoiseSource, Replayed, Sharded, SignedRoll
from gradsampler.parameterization import Parameterization, Preconditioning
from gradsampler.redistribution import joined, part

_MIXED = "mixed torch.Tensor and DTensor"


@dataclass(frozen=True)
class Layout:
    """How a state [B, *state] is cut."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size  # of the whole

    @classmethod
    def of(cls, z0: DTensor) -> "Layout":
        """The layout of z0; the same error on all ranks for one that no run can serve."""
        layout = cls(z0.device_mesh, tuple(z0.placements), z0.shape)
        expected, hint = "be laid out by Shard and Replicate", "z0.redistribute(placements=...)"
        if any(type(p) not in (Shard, Replicate) for p in layout.placements):
            _checks.fail("z0", expected, layout.placements, hint)
        if 0 in layout._sizes():
            got = f"{list(z0.shape)} by {layout.placements} on {layout.mesh.shape}"
            _checks.fail("z0", "give each rank an element at least", got, hint)
        own, _ = compute_local_shape_and_global_offset(z0.shape, z0.device_mesh, z0.placements)
        other = tuple(z0.to_local().shape) != tuple(own)
        if Agreement(layout.mesh.get_all_groups()).any(other):
            hint = "torch.distributed.tensor.distribute_tensor lays it out so"
            _checks.fail("z0", f"have parts as torch.chunk cuts {list(z0.shape)}", "others", hint)
        return layout

    def _sizes(self) -> set[int]:
        """All lengths that an axis which is cut has on some rank."""
        found = set(self.shape)
        for dim in {p.dim for p in self.placements if isinstance(p, Shard)}:
            sizes = {self.shape[dim]}
            for k, p in enumerate(self.placements):
                if isinstance(p, Shard) and p.dim == dim:
                    ranks = range(self.mesh.size(k))
                    chunks = [(size, math.ceil(size / len(ranks))) for size in sizes]
                    sizes = {min(c, max(0, size - c * r)) for size, c in chunks for r in ranks}
            found |= sizes
        return found

    @property
    def cuts_states(self) -> bool:
        """Whether a sample lies on several ranks."""
        return any(isinstance(p, Shard) and p.dim > 0 for p in self.placements)

    def local(self, argument: str, x: object) -> Tensor:
        """This rank's part of a tensor, which is laid out as z0 first."""
        if not isinstance(x, DTensor) or x.device_mesh != self.mesh:
            got = "one on another mesh" if isinstance(x, DTensor) else type(x).__name__
            hint = "distribute_tensor(start, z0.device_mesh, z0.placements)"
            _checks.fail(argument, "be a DTensor on the mesh of z0", got, hint)
        _checks.shape(argument, x, self.shape)
        return part(x, self.placements)

    def whole(self, x: Tensor, shape: Sequence[int] | None = None) -> DTensor:
        """The DTensor whose part on this rank is ``x``; one of shape [B] follows the batch."""
        shape = self.shape if shape is None else torch.Size(shape)
        placements = self.placements
        if len(shape) < len(self.shape):
            placements = tuple(p if p == Shard(0) else Replicate() for p in placements)
        stride = torch.empty(shape, device="meta").stride()
        return joined(x, self.mesh, placements, shape, stride)

    def program(self, program: Program) -> Program:
        """The program of a part, whose coefficients receive the sum over all parts."""
        coefficients = program.coefficients
        if coefficients.requires_grad:
            coefficients = self._summed(coefficients)
        if program.by_sample:
            if coefficients.shape[1] != self.shape[0]:
                expected = f"have shape [N+1, {self.shape[0]}]"
                _checks.fail("sigmas", expected, f"{coefficients.shape[1]} columns")
            own, begin = compute_local_shape_and_global_offset(
                self.shape, self.mesh, self.placements
            )
            coefficients = coefficients.narrow(1, begin[0], own[0])
        if coefficients is program.coefficients:
            return program
        return replace(program, coefficients=coefficients)

    def noise(self, source: object, z0: DTensor, program: Program) -> Any:
        """The noise of a part; what is given as tensors is that of the part already."""
        if source is None and program.noises:
            source = SignedRoll(seed=0)
        if not program.noises or not isinstance(source, NoiseSource):
            return source
        if isinstance(source, (Given, Replayed)):
            return source
        return Sharded.of(self._learned(source), z0)

    def _learned(self, source: NoiseSource) -> NoiseSource:
        """The source, whose tensors receive the sum over all parts."""
        changes: dict[str, Any] = {}
        names: list[str] = [f.name for f in fields(source)] if is_dataclass(source) else []
        for name in names:
            value = getattr(source, name)
            if isinstance(value, NoiseSource):
                changes[name] = self._learned(value)
            elif isinstance(value, Tensor) and value.requires_grad:
                changes[name] = self._summed(value)
        # With changes it has fields, so it is a dataclass, which the checker cannot follow.
        return replace(source, **changes) if changes else source  # type: ignore[type-var]

    def _summed(self, x: Tensor) -> Tensor:
        cut = [k for k, p in enumerate(self.placements) if isinstance(p, Shard)]
        summed: Tensor = _Summed.apply(x, Agreement([self.mesh.get_group(k) for k in cut]))
        return summed

    def callback(self, callback: Callable[[StepInfo], object]) -> Callable[[StepInfo], object]:
        """The callback, told of DTensors."""

        def told(info: StepInfo) -> object:
            sigma = info.sigma
            if isinstance(sigma, Tensor):
                sigma = self.whole(sigma, self.shape[:1])
            x, denoised = self.whole(info.x), self.whole(info.denoised)
            return callback(info._replace(sigma=sigma, x=x, denoised=denoised))

        return told

    def level(self, level: Tensor) -> DTensor:
        """The levels [B] of a part as the network gets them."""
        # Where a state is cut, each of its ranks gets the whole gradient of a level that all have,
        # and what is summed over them later is to be that gradient once.
        times = math.prod(
            self.mesh.size(k)
            for k, p in enumerate(self.placements)
            if isinstance(p, Shard) and p.dim > 0
        )
        if level.requires_grad and times > 1:
            level = _Share.apply(level, times)
        return self.whole(level, self.shape[:1])


class Ranks(Wrapper, nn.Module):
    """The processes of a mesh, as a part of the denoiser that they share."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self._mesh = mesh

    def groups(self) -> list[Any]:
        return list(self._mesh.get_all_groups())


class Placed(Parameterization):
    """A parameterization whose network is called with DTensors, in a run of their parts."""

    def __init__(self, inner: Parameterization, layout: Layout, step: int = 0) -> None:
        self.inner, self.network = inner, inner.network
        self._layout, self._step = layout, step
        self._ranks = Ranks(layout.mesh)

    @property
    def coordinates(self) -> Coordinates:
        return self.inner.coordinates

    @property
    def width(self) -> int:
        return self.inner.width

    def described(self) -> Hashable | None:
        return self.inner.described()

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return self.inner.preconditioning(sigma)

    def limit(self) -> Preconditioning:
        return self.inner.limit()

    def on(self, sigmas: Tensor) -> "Placed":
        return Placed(self.inner.on(sigmas), self._layout, self._step)

    def at(self, step: int) -> "Placed":
        return Placed(self.inner.at(step), self._layout, step)

    def modules(self) -> Iterator[nn.Module]:
        yield from self.inner.modules()
        yield from self.behind

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return self.chosen(x, noise, cond, range(self.width))

    def chosen(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Any], branches: Sequence[int]
    ) -> tuple[Tensor, ...]:
        layout = self._layout
        try:
            outputs = self.inner.chosen(layout.whole(x), layout.level(noise), cond, branches)
        except RuntimeError as error:
            if _MIXED not in str(error):
                raise
            _checks.fail(
                "denoiser: its weights and the tensors in cond",
                "be DTensors where z0 is one",
                "a plain tensor",
                "call torch.distributed.tensor.distribute_module(network, z0.device_mesh); "
                "or, as under fully_shard, run from z0.to_local() with noise=Sharded.of(noise, z0)",
            )
        return tuple(map(self._local, outputs))

    def _local(self, output: object) -> Tensor:
        name = f"denoiser: the output at step {self._step}"
        if not isinstance(output, DTensor):
            hint = "make one of a part by DTensor.from_local"
            _checks.fail(name, "be a DTensor as its input is", type(output).__name__, hint)
        _checks.shape(name, output, self._layout.shape)
        placed = (output.shape, output.device_mesh, output.placements)
        own, _ = compute_local_shape_and_global_offset(*placed)
        there = list(output._local_tensor.shape)
        if there != list(own):  # as of torch 2.13's convolution of a cut image
            hint = "an operation of DTensor in it is wrong; examples/cut_unet.py has convolutions"
            _checks.fail(name, f"have a part of {list(own)}, as its placements say", there, hint)
        return part(output, self._layout.placements)


class _Summed(torch.autograd.Function):
    """Numbers as they are, whose cotangents are summed over the parts of the state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Agreement) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        sums = ctx.parts.sums(*g.flatten().tolist())
        return torch.tensor(sums, dtype=g.dtype, device=g.device).view_as(g), None


class _Share(torch.autograd.Function):
    """A tensor as it is, with an equal share of its cotangent for each of some ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g / ctx.ranks, None
