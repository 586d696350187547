# SPDX-License-Identifier: Apache-2.0
"""A rank's part of a DTensor in a layout of one's choice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement


def joined(
    x: Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: torch.Size,
    stride: Sequence[int],
) -> DTensor:
    """The DTensor whose part on this rank is ``x``, as ``DTensor.from_local`` makes it.

    A cotangent that is no DTensor, or none at all, which wrong operations give, is an error that
    says so.

    Args:
        x: the part.
        mesh, placements: how it is cut.
        shape, stride: of the whole.
    """
    whole: DTensor = _Joined.apply(x, mesh, tuple(placements), (shape, tuple(stride)))
    return whole


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


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, placements: Any, sizes: Any) -> DTensor:
        ctx.placements = placements
        ctx.set_materialize_grads(False)
        shape, stride = sizes
        return DTensor.from_local(
            x.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    @staticmethod
    def backward(ctx: Any, g: DTensor | None) -> tuple[Tensor | None, None, None, None]:
        if not isinstance(g, DTensor):  # as of the convolution of a cut image before torch 2.13
            raise RuntimeError(
                "the gradient of a DTensor in the denoiser must be a DTensor, got "
                f"{type(g).__name__}; an operation of DTensor in it is wrong; examples/cut_unet.py "
                "has convolutions"
            )
        return part(g, ctx.placements), None, None, None


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
