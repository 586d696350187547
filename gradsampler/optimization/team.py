# SPDX-License-Identifier: Apache-2.0
"""The ranks that share a batch of noises: each optimises its own, and all know of all."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from gradsampler import _checks
from gradsampler.arguments import record
from gradsampler.engine.agreement import Agreement
from gradsampler.engine.observer import NonFiniteError
from gradsampler.noise.sharded import Sharded
from gradsampler.noise.sources import Given, SignedRoll

T = TypeVar("T")
_RECORDED = ("solver", "prediction", "churn", "eta", "s_noise", "final_denoise")


class Team:
    """A batch of samples in as many neighbouring parts as there are ranks.

    Args:
        group: a process group; None is one process that has the whole batch.
        batch: samples of the whole.
    """

    def __init__(self, group: Any, batch: int) -> None:
        self._group = group
        self._batch = batch
        self._size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._agreement = Agreement([] if group is None else [group])
        if batch < self._size:
            expected = f"hold a sample for each of the {self._size} ranks"
            _checks.fail("z0", expected, f"{batch} samples")
        parts = torch.arange(batch).tensor_split(self._size)
        self._parts = [(int(part[0]), len(part)) for part in parts]
        self.offset, self._length = self._parts[self.rank]

    @property
    def alone(self) -> bool:
        """Whether there is one rank."""
        return self._size == 1

    def weighed(self, mean: Tensor) -> Tensor:
        """A mean over this rank's samples as its share of the mean over all."""
        return mean if self.alone else self._length / self._batch * mean

    def totals(self, mean: float, norm: float, root: float) -> tuple[float, float, float]:
        """Of all samples: a mean over them, a norm, and the root of a mean square."""
        if self.alone:
            return mean, norm, root
        share = self._length / self._batch
        mean, norm, root = self._agreement.sums(share * mean, norm**2, share * root**2)
        return mean, math.sqrt(norm), math.sqrt(root)

    def own(self, x: T) -> T:
        """What of a whole is this rank's: of a tensor with a sample in each row, its rows."""
        if isinstance(x, Tensor) and x.ndim and len(x) == self._batch:
            return x.narrow(0, self.offset, self._length)  # type: ignore[return-value]
        return x

    def options(
        self, denoiser: Any, sigmas: Tensor, sample_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of `sample` for this rank's part of the batch."""
        options = dict(sample_kwargs)
        if self.alone:
            return options
        if sigmas.ndim != 1:
            _checks.fail("sigmas", "be those of all samples where ranks share these", sigmas.shape)
        if options.get("start") is not None:
            options["start"] = self.own(options["start"])
        cond = options.get("cond")
        if cond is not None:
            options["cond"] = pytree.tree_map(self.own, cond)
        noise = options.get("noise")
        if isinstance(noise, Given):
            options["noise"] = Given([self.own(x) for x in noise.tensors])
            return options
        recorded = {name: options[name] for name in _RECORDED if name in options}
        started = options.get("start") is not None
        program, _ = record(denoiser, sigmas, **recorded, started=started)
        if program.noises:
            options["noise"] = Sharded(noise or SignedRoll(seed=0), self.offset)
        return options

    def gathered(self, x: Tensor) -> Tensor:
        """The whole [B, ...] of which each rank has its rows, on every rank."""
        if self.alone:
            return x
        longest = max(length for _, length in self._parts)
        own = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]).contiguous()
        everyone = [torch.empty_like(own) for _ in self._parts]
        dist.all_gather(everyone, own, group=self._group)
        rows = zip(everyone, self._parts, strict=True)
        return torch.cat([part[:length] for part, (_, length) in rows])

    def together(self, function: Callable[[], T], what: str) -> T:
        """What a function returns; where it fails on any rank, an error on all."""
        if self.alone:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        if not self._agreement.any(error is not None):
            return result
        told: list[Any] = [None] * self._size
        kind = NonFiniteError if isinstance(error, NonFiniteError) else RuntimeError
        mine = None if error is None else (kind, f"{type(error).__name__}: {error}")
        dist.all_gather_object(told, mine, group=self._group)
        if error is not None:
            raise error
        rank, (kind, text) = next((k, each) for k, each in enumerate(told) if each)
        raise kind(f"{what} failed on rank {rank}: {text}")

    def from_first(self, value: T) -> T:
        """What the first rank has, on all."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]
