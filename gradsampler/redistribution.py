# SPDX-License-Identifier: Apache-2.0
"""A rank's part of a DTensor in a layout of one's choice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement


def part(x: DTensor, placements: Sequence[Placement], shares: Sequence[Placement] = ()) -> Tensor:
    """The part of ``x`` on this rank, once that is laid out by ``placements``.

    As ``x.redistribute(...).to_local(grad_placements=shares)``, which is waited for; and nothing is
    wrong with a part that gets no gradient, of which the backward of redistribute makes an error.

    Args:
        x: any DTensor.
        placements: how the part is cut.
        shares: what the cotangent of the part is; of none ``placements``.
    """
    own: Tensor = _Part.apply(x, tuple(placements), tuple(shares or placements))
    return own


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor, placements: Any, shares: Any) -> Tensor:
        ctx.mesh, ctx.before, ctx.shares = x.device_mesh, x.placements, shares
        ctx.sizes = x.shape, x.stride()
        ctx.set_materialize_grads(False)
        own = x.redistribute(x.device_mesh, placements).to_local()
        own = own.wait() if isinstance(own, AsyncCollectiveTensor) else own
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        if g is None:
            return None, None, None
        shape, stride = ctx.sizes
        spread = DTensor.from_local(
            g.contiguous(), ctx.mesh, ctx.shares, run_check=False, shape=shape, stride=stride
        )
        before = [_gradient(p) for p in ctx.before]
        return spread.redistribute(ctx.mesh, before), None, None


def _gradient(p: Placement) -> Placement:
    """How the gradient of a tensor is laid out: what is a partial sum has a whole one."""
    return Replicate() if p.is_partial() else p
