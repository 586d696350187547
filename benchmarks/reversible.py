# SPDX-License-Identifier: Apache-2.0
"""What midpoint_reversible costs in accuracy and memory="reversible" in time.

Errors are those of whole runs at equal numbers of model evaluations, in the L2 norm of a sample,
against Heun's method with many steps; a row has the median, 20 % and 80 % quantiles of the samples.

make bench-reversible
"""

import argparse
from collections.abc import Callable

import rows
import timing
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import gradsampler as gs
from gradsampler import models

Rows = list[dict[str, str]]
Sample = Callable[[str, int], Tensor]  # from a solver and a number of evaluations
REVERSIBLE = "midpoint_reversible"
SOLVERS = ("euler", "heun", "dpmpp_2m", REVERSIBLE)


def add(
    table: Rows,
    variant: str,
    shape: str,
    dtype: str,
    metric: str,
    unit: str,
    values: timing.Quantiles,
) -> None:
    """One row, printed as well."""
    print(f"{variant:20} {shape:28} {metric:36} {values[0]:.6g} {unit}", flush=True)
    table.append(rows.row("reversible", variant, shape, dtype, metric, unit, values))


class SmoothedDigits:
    """The exact denoiser of real digits, each blurred by a normal of deviation ``width``."""

    def __init__(self, count: int, width: float = 0.1) -> None:
        self.data = torch.as_tensor(load_digits().data[:count] / 8 - 1)
        self.width = width

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma e = x], [B, 64]."""
        noise = sigma[:, None] ** 2
        total = noise + self.width**2
        share = torch.softmax(-(torch.cdist(x, self.data) ** 2) / (2 * total), dim=1)
        return (self.width**2 * x + noise * (share @ self.data)) / total


def sampler(denoiser: object, shape: tuple[int, ...], **options: object) -> Sample:
    """Runs on the same noises, float64, from level 80 to 0.002."""
    z0 = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    @torch.no_grad()
    def sample(solver: str, calls: int) -> Tensor:
        sigmas = gs.schedules.karras(calls // 2 if solver == "heun" else calls)
        return gs.sample(denoiser, z0, sigmas, solver=solver, **options)

    return sample


def errors(table: Rows, problem: str, sample: Sample, fine: int, counts: tuple[int, ...]) -> None:
    """Errors of the solvers, and the worst sample's."""
    exact = sample("heun", fine)
    shape = "x".join(map(str, exact.shape))
    for calls in counts:
        for solver in SOLVERS:
            found = (sample(solver, calls) - exact).flatten(1).norm(dim=1)
            where = f"{shape} {calls} calls"
            values = timing.quantiles(found.tolist())
            add(table, solver, where, "float64", f"error on {problem}", "1", values)
            worst = (found.max().item(),) * 3
            add(table, solver, where, "float64", f"largest error on {problem}", "1", worst)


def accuracy(
    table: Rows, batch: int, fine: int, counts: tuple[int, ...], scales: tuple[float, ...]
) -> None:
    """On a closed form, on the shipped model, and on that under guidance."""
    errors(table, "400 digits", sampler(SmoothedDigits(400), (batch, 64)), fine, counts)
    network = models.load_network().double()
    shape, label = (batch, 1, 8, 8), torch.arange(batch) % 10
    denoiser = gs.EDM(network, network.sigma_data)
    errors(table, "the model", sampler(denoiser, shape, cond={"label": label}), fine, counts)
    for scale in scales:
        guided = gs.Guided(denoiser, scale, {"label": torch.full_like(label, 10)})
        sample = sampler(guided, shape, cond={"label": label})
        errors(table, f"the model, guidance {scale:g}", sample, fine, counts)


def spread(table: Rows, count: int, etas: tuple[float, ...]) -> None:
    """Standard deviation of samples of normal data over the data's, by the relative churn."""

    def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.25 * x / (0.25 + sigma[:, None] ** 2)

    z0 = torch.randn(count, 1000, generator=torch.Generator().manual_seed(0))
    sigmas = gs.schedules.karras(100)
    for source in (gs.noise.Philox(), gs.noise.SignedRoll()):
        for eta in etas:
            churn = gs.Churn(100 * eta)
            with torch.no_grad():
                for solver in ("euler", "heun", REVERSIBLE):
                    options = {"solver": solver, "churn": churn, "noise": source}
                    x = gs.sample(gaussian, z0, sigmas, **options)
                    values = (2 * x.double().std().item(),) * 3
                    metric = f"deviation, {type(source).__name__} eta={eta:g}"
                    add(table, solver, f"{count}x1000 N=100", "float32", metric, "1", values)


def times(table: Rows, rounds: int, batch: int, steps: int) -> None:
    """Time of a gradient through the shipped model, over that of checkpoint."""
    network = models.load_network()
    denoiser, sigmas = gs.EDM(network, network.sigma_data), gs.schedules.karras(steps)
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(batch, 1, 8, 8, generator=generator).requires_grad_()

    def gradient(memory: str) -> object:
        x = gs.sample(denoiser, z0, sigmas, solver=REVERSIBLE, churn=gs.Churn(5.0), memory=memory)
        return torch.autograd.grad(x.square().mean(), z0)

    names = ("checkpoint", "reversible")
    found = timing.interleaved({name: lambda name=name: gradient(name) for name in names}, rounds)
    shape = f"{batch}x1x8x8 N={steps}"
    for name in names:
        add(table, f"memory={name}", shape, "float32", "time of a gradient", "s", found[name])
    ratio = found["reversible"][0] / found["checkpoint"][0]
    add(table, "memory=reversible", shape, "float32", "time over checkpoint", "1", (ratio,) * 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    small = parser.parse_args().rehearse
    table: Rows = []
    accuracy(
        table, *((2, 4, (2,), (7.5,)) if small else (64, 2000, (32, 128), (1.0, 3.0, 7.5, 15.0)))
    )
    spread(table, *((1, (0.05,)) if small else (100, (0.05, 0.0954, 0.15, 0.186, 0.3, 0.4))))
    times(table, *((1, 1, 2) if small else (25, 64, 64)))
    if small:
        print(f"rehearsed {len(table)} rows")
    else:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
