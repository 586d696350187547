"""Fine-tune a network through the whole sampling run, its weights in shards (DRaFT under FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/finetune_fsdp.py

Clark et al. 2023, "Directly fine-tuning diffusion models on differentiable rewards", on the shipped
digits: the reward is how surely the classifier reads one digit, and its gradient reaches the
weights through every step of the sampler. Each rank has noises of its own and a part of the
weights; between runs a block's weights are together only while it computes.
"""

from __future__ import annotations

import argparse
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digit", type=int, default=3)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="noises of each rank and update")
    parser.add_argument("--steps", type=int, default=12, help="of the sampler")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--memory", default="auto")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    network, classifier = models.load_network().requires_grad_(), models.load_classifier()
    # It returns a view, of which FSDP warns whom would write into it; a run does not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    update = torch.optim.Adam(network.parameters(), lr=options.lr)
    denoiser, levels = gs.EDM(network, network.sigma_data), gs.schedules.karras(options.steps)
    target = torch.full((options.batch,), options.digit)

    rewards = []
    for step in range(options.updates):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + rank)
        z0 = torch.randn(options.batch, 1, 8, 8, generator=generator)
        x = gs.sample(denoiser, z0, levels, solver="heun", memory=options.memory)
        loss = F.cross_entropy(classifier(x), target)
        update.zero_grad()
        loss.backward()  # one reduction a group of weights, whatever number of model calls
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        update.step()
        reward = (-loss.detach()).exp()
        dist.all_reduce(reward)
        rewards.append(float(reward) / dist.get_world_size())
    if rank == 0:
        print(f"p({options.digit}), geometric mean: {rewards[0]:.4f} to {rewards[-1]:.4f}")
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
