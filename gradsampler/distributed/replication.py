# SPDX-License-Identifier: Apache-2.0
"""A network that several devices compute together, as one of a single device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from gradsampler import _checks
from gradsampler.engine.wrapper import Wrapper

__all__ = ["Replicated", "replicated"]


class Replicated(nn.Module, Wrapper):
    """What `replicated` returns: the network as ``.module``, and its process group."""

    def __init__(self, module: nn.Module, group: Any) -> None:
        super().__init__()
        self.module = module
        self._group = group

    def groups(self) -> list[Any]:
        return [self._group]

    def check(self) -> None:
        if self._sharded():
            from gradsampler.engine.fully_sharded import check_summed  # loads FSDP

            check_summed(self.module, dist.get_world_size(self._group))

    def _sharded(self) -> list[nn.Module]:
        """The modules whose weights are FSDP2's, which sums their gradients itself."""
        return [each for each in self.module.modules() if hasattr(each, "_get_fsdp_state")]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, with gradients that are those of one device."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        args, kwargs = pytree.tree_map(self._summed, (args, kwargs))
        theirs = {id(p) for each in self._sharded() for p in each.parameters()}
        named = self.module.named_parameters()
        trained = {name: self._summed(p) for name, p in named if id(p) not in theirs}
        trained = {name: p for name, p in trained.items() if not isinstance(p, nn.Parameter)}
        if not trained:
            return self.module(*args, **kwargs)
        return torch.func.functional_call(self.module, trained, args, kwargs)

    def _summed(self, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        if _checks.distributed(x):
            hint = "DTensor's operations sum shares themselves: take the network as it is"
            _checks.fail("replicated: each tensor", "be a plain one", "a DTensor", hint)
        return _Summed.apply(x, self._group)


def replicated(module: nn.Module, group: Any = None) -> Replicated:
    """Wraps a network that ranks compute together, so that gradients are those of one device.

    For networks that get the same arguments on all ranks of a group, split the work inside, and
    return the same output on all: context parallelism, as by diffusers' ``enable_parallelism``. In
    backward, each rank only gets its own chunk's share of the gradients to the input, the
    conditioning, the noise level and the parameters, whereas the rest of a sampler is the same on
    all ranks. Without a sum over the ranks the gradient of a run is wrong, under every memory
    strategy.

    Each model call costs one reduction for every tensor that requires grad. Ranks agree on what
    memory="auto" keeps, and errors that depend on values are raised on all ranks.

    Args:
        module: the network; its loss has to be the same on all ranks.
        group: the process group; None is that of all ranks.

    Returns:
        A module with the network's arguments, to give to `sample` as denoiser, or to its wrappers.

    Example:
        >>> import torch, torch.distributed as dist, gradsampler as gs
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> network = gs.distributed.replicated(torch.nn.Linear(3, 3))
        >>> x = gs.sample(lambda x, s: network(x), torch.randn(2, 3), gs.schedules.karras(5))
        >>> dist.destroy_process_group()
    """
    if not isinstance(module, nn.Module):
        _checks.fail_type("replicated: module", "be a torch.nn.Module", module)
    if not (dist.is_available() and dist.is_initialized()):
        hint = "call torch.distributed.init_process_group, or run without replicated"
        _checks.fail("replicated", "have connected processes", "none", hint)
    return Replicated(module, dist.group.WORLD if group is None else group)


class _Summed(torch.autograd.Function):
    """A tensor as it is, whose cotangent is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.contiguous().clone()
        dist.all_reduce(g, group=ctx.group)
        return g, None
