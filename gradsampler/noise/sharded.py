# SPDX-License-Identifier: Apache-2.0
"""The part of a noise that a process needs, where a batch or a state is spread over several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import OFF, SINCOS, Draw
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import Cotangent, Given, Injected, NoiseSource, name_of

__all__ = ["Sharded"]


class Window(NamedTuple):
    """Where a shard lies in what it is a part of."""

    source: NoiseSource  # of the whole
    z0: Tensor  # [*, *state] the whole, or as much of it as the noise of the shard depends on
    dim: int
    offset: int
    length: int

    def own(self, x: Tensor) -> Tensor:
        """The shard of ``x``, which is shaped as the whole."""
        return x.narrow(self.dim, self.offset, self.length)

    def spread(self, x: Tensor) -> Tensor:
        """``x``, shaped as the shard, in the whole; zero elsewhere."""
        whole = x.new_zeros(self.z0.shape)
        self.own(whole).copy_(x)
        return whole


@dataclass(frozen=True, eq=False)
class Sharded(NoiseSource):
    """The noise of a whole run, for a run of a part of it: the same values, bit for bit.

    A noise depends on the index of an element. Without ``Sharded``, two processes that each run
    half a batch would inject the same noises into both halves, and parts of a state that is cut
    along an axis would each be rolled separately. With ``Sharded`` each part gets what the
    undivided run injects there.

    A part of the batch (``dim=0``) needs only the number of its first sample. A part of a state
    needs the whole initial noise, because that is rolled across the parts. Each process holds it,
    so nothing is communicated in the forward pass. The gradient to it is then this part's share:
    sum it over the processes. `Sharded.of` does so for a DTensor.

    Parts and whole agree on every backend, bit for bit (a `Mixture` on "triton", and 16 bits on a
    GPU, up to rounding). A part of the batch computes the noise of all samples before it too.

    Args:
        source: the noise of the whole; any but `Given` and `Replayed`, whose noises you cut
            yourself.
        offset: where this part begins along ``dim``.
        dim: the axis of [B, *state] that is cut.
        whole: for ``dim`` >= 1: the whole initial noise [B, *state], of which z0 is a part; may
            require grad.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.randn(4, 6)
        >>> noise = gs.noise.SignedRoll(seed=1)
        >>> second_half = gs.noise.Sharded(noise, offset=2)
        >>> torch.equal(second_half.at(z0[2:], 3, 10), noise.at(z0, 3, 10)[2:])
        True
        >>> right = gs.noise.Sharded(noise, offset=4, dim=1, whole=z0)
        >>> torch.equal(right.at(z0[:, 4:], 3, 10), noise.at(z0, 3, 10)[:, 4:])
        True
    """

    source: NoiseSource
    offset: int
    dim: int = 0
    whole: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, NoiseSource):
            _checks.fail_type("Sharded: source", "be a gradsampler.noise object", self.source)
        if isinstance(self.source, (Given, Replayed, Sharded)):
            hint = "name one axis" if isinstance(self.source, Sharded) else "cut what it gives"
            _checks.fail("Sharded: source", "be the noise of a whole", repr(self.source), hint)
        _checks.integer("Sharded: offset", self.offset, 0)
        _checks.integer("Sharded: dim", self.dim, 0)
        if self.dim and self.whole is None:
            hint = "give the initial noise of the whole state, which every process holds"
            _checks.fail("Sharded: whole", "be given for a part of a state", None, hint)
        if self.dim == 0 and self.whole is not None:
            _checks.fail("Sharded: whole", "be None for a part of a batch", "a tensor")
        if self.whole is not None:
            whole = _checks.batched("Sharded: whole", self.whole)
            object.__setattr__(self, "whole", _checks.savable(whole))

    @classmethod
    def of(cls, source: NoiseSource, z0: Any) -> "NoiseSource":
        """The noise of this process's part of a DTensor, by its mesh and placements.

        Args:
            source: the noise of the whole.
            z0: a DTensor [B, *state], cut along one axis or none. Where that is an axis of the
                state, it is gathered once, and its gradient is summed over the mesh.

        Raises:
            ValueError: for a DTensor that is cut along several axes, or a partial sum.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        from gradsampler.redistribution import part

        cut = {p.dim for p in z0.placements if isinstance(p, Shard)}
        if len(cut) > 1 or any(type(p) not in (Shard, Replicate) for p in z0.placements):
            hint = "redistribute it"
            _checks.fail("z0", "be cut along one axis at most", z0.placements, hint)
        if not cut:
            return source
        (dim,) = cut
        _, offsets = compute_local_shape_and_global_offset(z0.shape, z0.device_mesh, z0.placements)
        if dim == 0:
            return cls(source, offsets[0])
        partial = [Partial() if isinstance(p, Shard) else Replicate() for p in z0.placements]
        whole = [Replicate()] * len(partial)
        return cls(source, offsets[dim], dim, part(z0, whole, partial))

    def window(self, z0: Tensor) -> Window:
        """Where the part ``z0`` lies, for a backend that draws the noise of the whole."""
        length = z0.shape[self.dim]
        if self.whole is not None:
            whole = self.whole.to(z0.dtype)
        else:  # of the samples before this part nothing counts but their number
            whole = torch.cat([z0.new_zeros(self.offset, *z0.shape[1:]), z0])
        return Window(self.source, whole, self.dim, self.offset, length)

    @property
    def of_z0(self) -> bool:
        return self.source.of_z0 and self.dim == 0

    @property
    def needs_length(self) -> bool:
        return self.source.needs_length

    @property
    def normal(self) -> bool:
        return self.source.normal

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *(() if self.whole is None else (self.whole,)))

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        window = self.window(z0)
        return window.own(self.source.at(window.z0, *name_of(step, num_steps, draw)))

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        window = self.window(z0)
        name = name_of(step, num_steps, draw)
        pulled, tensors = self.source.transpose(window.spread(g), window.z0, *name)
        if pulled is None:
            return Cotangent(None, tensors)
        if self.dim == 0:
            return Cotangent(window.own(pulled), tensors)
        return Cotangent(None, {**tensors, len(self.source.tensors): pulled})

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> NoiseSource:
        whole = self.whole
        if self.dim >= z0.ndim:
            _checks.fail("noise=Sharded: dim", f"be an axis of z0, below {z0.ndim}", self.dim)
        if whole is not None:
            expected = [*z0.shape]
            expected[self.dim] = whole.shape[self.dim] if whole.ndim == z0.ndim else -1
            _checks.shape("noise=Sharded: whole", whole, expected)
            _checks.device("noise=Sharded: whole", whole, z0.device)
            if self.offset + z0.shape[self.dim] > whole.shape[self.dim]:
                room = whole.shape[self.dim] - z0.shape[self.dim]
                _checks.fail("noise=Sharded: offset", f"be at most {room} here", self.offset)
        return replace(self, source=self.source.prepare(self.window(z0).z0, injected))

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        if self.dim:
            return None
        found = self.source.draw(z0, *name_of(step, num_steps, draw))
        by_element = found is not None and found.kind in (OFF, SINCOS) and not found.normal
        return found if by_element else None  # the others depend on where an element lies
