"""Search over noises on several processes: the README's main job, where one device is too few.

    torchrun --standalone --nproc-per-node 2 examples/search_noises.py --out search

Each rank optimises its part of the noises, with the step noises that they have in the whole batch;
so any number of processes finds the same, and goes on from the same file. Alone, without torchrun,
it is one process.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models


def picture(path: Path, before: Tensor, after: Tensor, ranks: int) -> None:
    """The samples of the first and of the found noises; a frame's colour is the rank's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(before), figsize=(len(before) * 0.8, 1.9))
    owner = torch.arange(len(before)).tensor_split(ranks)
    colours = {int(i): f"C{rank}" for rank, part in enumerate(owner) for i in part}
    for row, (name, samples) in zip(axes, (("first", before), ("found", after)), strict=True):
        row[0].set_ylabel(name)
        for i, axis in enumerate(row):
            axis.imshow(models.to_pixels(samples[i, 0]), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor(colours[i])
                spine.set_linewidth(3)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("search"))
    parser.add_argument("--digit", type=int, default=7)
    parser.add_argument("--noises", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--steps", type=int, default=35, help="of the sampler")
    options = parser.parse_args()

    group = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    first = group is None or dist.get_rank() == 0
    options.out.mkdir(exist_ok=True)

    network, classifier = models.load_network(), models.load_classifier()
    denoiser, levels = gs.EDM(network, network.sigma_data), gs.schedules.karras(options.steps)
    generator = torch.Generator().manual_seed(0)  # the whole batch, the same on all ranks
    z0 = torch.randn(options.noises, 1, 8, 8, generator=generator).requires_grad_()
    sampler = {"solver": "res_2ab", "churn": gs.Churn(10.0), "memory": "checkpoint"}

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(classifier(x), torch.full((len(x),), options.digit))

    result = gs.optimize(
        denoiser,
        z0,
        levels,
        loss,
        steps=options.iterations,
        lr=0.1,
        regularizer=gs.regularizers.ChiNorm(0.01),
        checkpoint=options.out / "search.checkpoint",
        progress=True,
        group=group,
        **sampler,
    )
    if first:
        with torch.no_grad():
            before = gs.sample(denoiser, z0, levels, **sampler)
            found = classifier(result.sample).softmax(1)[:, options.digit]
        ranks = 1 if group is None else dist.get_world_size()
        picture(options.out / "search-noises.png", before, result.sample, ranks)
        begin, end = result.history[0].loss, result.history[-1].loss
        print(
            f"loss {begin:.4f} to {end:.4f}; the best noise is {int(found.argmax())}, "
            f"p({options.digit}) = {found.max():.4f}, least {found.min():.4f}"
        )
    if group is not None:
        dist.barrier()  # nobody leaves while another still waits for it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
