"""One image on several processes: a small U-Net, cut along the width, and the gradient of its run.

    torchrun --standalone --nproc-per-node 2 examples/cut_unet.py

Torch's own convolution of a DTensor that is cut along an image is wrong in 2.13, in silence. So the
layers here compute on their own columns, and get from their neighbours what they need of them: a
column for a convolution of 3x3, sums for a group norm. All of it by DTensor, whose backward sends
what belongs to a neighbour back.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.nn import functional as F

import gradsampler as gs

WIDTH = Shard(3)


def part(x: DTensor) -> Tensor:
    """The columns of this rank; of a weight all of it, whose gradient is a share."""
    return x.to_local(grad_placements=[WIDTH if x.placements[0] == WIDTH else Partial()])


def cut(x: Tensor, like: DTensor) -> DTensor:
    """Columns of this rank, as many as each has."""
    return DTensor.from_local(x, like.device_mesh, [WIDTH])


def everywhere(x: Tensor, placement: Shard | Partial, like: DTensor) -> Tensor:
    """The parts of all ranks joined, or added up; each rank has a share of their gradient."""
    whole = DTensor.from_local(x, like.device_mesh, [placement]).redistribute(
        placements=[Replicate()]
    )
    return whole.to_local(grad_placements=[Partial()])


class Conv(nn.Conv2d):
    """A convolution of 3x3 that keeps the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return super().forward(x)
        own, rank = part(x), x.device_mesh.get_local_rank()
        edges = everywhere(torch.cat([own[..., :1], own[..., -1:]], 3), WIDTH, x)
        edges = F.pad(edges, (1, 1))  # beyond the image there is nothing
        left, right = edges[..., 2 * rank, None], edges[..., 2 * rank + 3, None]
        halo = torch.cat([left, own, right], 3)
        return cut(F.conv2d(halo, part(self.weight), part(self.bias), padding=(1, 0)), x)


class Norm(nn.GroupNorm):
    """A group norm, whose mean and variance are those of all columns."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return super().forward(x)
        own = part(x).unflatten(1, (self.num_groups, -1))
        count = x.numel() // len(x) // self.num_groups
        axes, placement = (2, 3, 4), Partial()
        mean = everywhere(own.sum(axes, keepdim=True), placement, x) / count
        own = own - mean
        variance = everywhere(own.square().sum(axes, keepdim=True), placement, x) / count
        own = (own / torch.sqrt(variance + self.eps)).flatten(1, 2)
        weight, bias = part(self.weight)[:, None, None], part(self.bias)[:, None, None]
        return cut(own * weight + bias, x)


def halved(x: Tensor) -> Tensor:
    """The mean of 2x2 pixels, which no cut parts where each rank has an even number of columns."""
    return cut(F.avg_pool2d(part(x), 2), x) if isinstance(x, DTensor) else F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Each pixel four times."""
    if isinstance(x, DTensor):
        return cut(doubled(part(x)), x)
    return F.interpolate(x, scale_factor=2.0)


class Block(nn.Module):
    """A convolution, a norm, and what the level adds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = Conv(inputs, outputs), Norm(4, outputs)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)) + 0.1 * sigma.log()[:, None, None, None])


class UNet(nn.Module):
    """Two levels and a skip connection; the same code for a whole image and for a cut one."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.enter, self.down = Block(3, channels), Block(channels, 2 * channels)
        self.middle = Block(2 * channels, channels)
        self.up, self.leave = Block(2 * channels, channels), Conv(channels, 3)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        skip = self.enter(x, sigma)
        h = self.middle(self.down(halved(skip), sigma), sigma)
        return self.leave(self.up(torch.cat([doubled(h), skip], 1), sigma))


def kept(network: nn.Module, x: Tensor, sigma: Tensor) -> int:
    """Bytes that autograd keeps of a call on this rank, beside weights."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            local = getattr(x, "_local_tensor", x)
            sizes[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(x, sigma)
    return sum(sizes.values())


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    alone = UNet()
    together = distribute_module(copy.deepcopy(alone), mesh)  # each rank has all weights
    noise = torch.randn(1, 3, 16, 16 * dist.get_world_size())
    levels = gs.schedules.karras(8)
    found = []
    for network, z0 in ((alone, noise), (together, distribute_tensor(noise, mesh, [WIDTH]))):
        z0.requires_grad_()
        x = gs.sample(network, z0, levels, solver="euler_ancestral", memory="checkpoint")
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        whole.square().sum().backward()
        gradients = [z0.grad, *(p.grad for p in network.parameters())]
        full = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        found.append([whole.detach(), *full])
        sigma = distribute_tensor(torch.ones(1), mesh) if network is together else torch.ones(1)
        found[-1].append(kept(network, z0, sigma))
    *expected, bytes_alone = found[0]
    *got, bytes_together = found[1]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
    if dist.get_rank() == 0:
        print(f"sample {errors[0]:.1e}, gradient to z0 {errors[1]:.1e}, ", end="")
        print(f"to the weights at most {max(errors[2:]):.1e} off the run of the whole")
        print(f"activations of a call: {bytes_alone} bytes alone, {bytes_together} a rank together")
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
