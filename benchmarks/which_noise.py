# SPDX-License-Identifier: Apache-2.0
"""Which step noise to use: are the samples right, and how good is the gradient to z0?

Samples are those of exact denoisers (a Gaussian, a mixture of Gaussians, both in 64 dimensions) and
of the digits network; gradients and optimisations those of the digits network. A row's median is
over seeds, and its quantiles are the least and the greatest of them. Churn is S_churn = 10 with the
cap of EDM, eta = min(10 / N, sqrt(2) - 1).

make bench-noise
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import rows
import torch
from held_out import held_out
from torch import Tensor
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models
from gradsampler.noise import Mixture, NoiseSource, Philox, SignedRoll, SinCos

SHAPE = (1, 8, 8)
DIGIT = 7
COUNTS = (10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Signs(NoiseSource):
    """z0 with random signs, anew at each step, and not rolled: ``n_i = e_i * z0``."""

    seed: int = 0

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        return z0 * Philox(self.seed).at(z0[:1].detach(), step, num_steps, draw).sign()


SOURCES: dict[str, Callable[[int], NoiseSource]] = {
    "independent": Philox,
    "signed roll": SignedRoll,
    "mixture 0.4": lambda seed: Mixture(SignedRoll(seed), 0.4, seed + 1),
    "mixture 0.8": lambda seed: Mixture(SignedRoll(seed), 0.8, seed + 1),
    "signs": Signs,
    "sincos": lambda seed: SinCos(),
}
SOLVERS: dict[str, dict[str, Any]] = {
    "heun, churn": {"solver": "heun", "churn": gs.Churn(10.0)},
    "res_2ab, churn": {"solver": "res_2ab", "churn": gs.Churn(10.0)},
    "euler_ancestral": {"solver": "euler_ancestral"},
    "dpmpp_2m_sde": {"solver": "dpmpp_2m_sde"},
}


def normal(count: int, seed: int) -> Tensor:
    """[count, 1, 8, 8] standard normal."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


# Data whose denoiser is exact.


class Blobs:
    """Equal Gaussians of deviation ``std`` about centres; one at the origin is a Gaussian."""

    def __init__(self, centres: Tensor, std: float) -> None:
        self.centres, self.std = centres, std

    def data(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, *SHAPE, generator=generator)
        return self.centres[chosen] + self.std * noise

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x]: each blob's, weighted by its responsibility."""
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        total = self.std**2 + s2
        distance = torch.cdist(x.flatten(1), self.centres.flatten(1)) ** 2
        share = torch.softmax(-distance / (2 * total.view(-1, 1)), 1)
        centre = (share @ self.centres.flatten(1)).view_as(x)
        return (self.std**2 * x + s2 * centre) / total


GAUSSIAN = Blobs(torch.zeros(1, *SHAPE), 0.5)
MIXTURE = Blobs(normal(4, 99), 0.3)


class Digits:
    """The shipped network, of the class that a label asks for, beside real digits."""

    def __init__(self) -> None:
        network = models.load_network()
        self.denoise = gs.EDM(network, network.sigma_data)
        self.classifier = models.load_classifier()

    def data(self, count: int, seed: int) -> Tensor:
        """Held-out digits, which are 360."""
        return held_out(min(count, 360))[0]


# Measurements.


def run(data: Any, z0: Tensor, steps: int, source: NoiseSource, solver: str, **more: Any) -> Tensor:
    levels = gs.schedules.karras(steps, final="zero")
    return gs.sample(data.denoise, z0, levels, noise=source, **SOLVERS[solver], **more)


def kurtosis(x: Tensor) -> float:
    """Of the elements, each standardised over the batch; 3 for normal ones."""
    deviation = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    return deviation.pow(4).mean().item()


def sliced(x: Tensor, y: Tensor) -> float:
    """The sliced 2-Wasserstein distance of two sets of samples, over 200 directions."""
    directions = F.normalize(normal(200, 5).flatten(1), dim=1)
    grid = torch.linspace(0.005, 0.995, 200)
    a, b = ((each.flatten(1) @ directions.T).quantile(grid, 0) for each in (x, y))
    return (a - b).square().mean().sqrt().item()


def quality(
    name: str, data: Any, source: str, solver: str, steps: int, seed: int
) -> dict[str, float]:
    """Of samples."""
    count = 250 if name == "digits" else 500
    labels = torch.arange(count) % 10
    cond = {"cond": {"label": labels}} if name == "digits" else {}
    with torch.no_grad():
        z0 = normal(count, 1000 + seed)
        x = run(data, z0, steps, SOURCES[source](seed), solver, **cond)
    fresh = data.data(count, 2000 + seed)
    energy, expected = (each.flatten(1).square().mean(1) for each in (x, fresh))
    found = {
        "deviation over data's": (x.std() / fresh.std()).item(),
        "spread of energy over data's": (energy.std() / expected.std()).item(),
        "sliced Wasserstein distance": sliced(x, fresh),
    }
    if name != "digits":  # at the edge of a digit there are pixels that hardly vary
        found["kurtosis over data's"] = kurtosis(x) / kurtosis(fresh)
    else:
        read = data.classifier(x).argmax(1)
        found["read as their class"] = (read == labels).double().mean().item()
    return found


def correlations(source: str, seed: int, steps: int = 50, count: int = 256) -> dict[str, float]:
    """Of the injected noises with z0, and with one another."""
    z0, made = normal(count, seed), SOURCES[source](seed)
    noises = torch.stack([made.at(z0, i, steps) for i in range(0, steps, 5)]).flatten(2)
    unit = F.normalize(torch.cat([z0.flatten(1)[None], noises]), dim=2)
    inner = torch.einsum("ibd,jbd->ijb", unit, unit)
    apart = ~torch.eye(len(noises), dtype=torch.bool)
    between = inner[1:, 1:][apart]
    return {
        "correlation with z0": inner[0, 1:].mean().item(),
        "correlation between steps": between.mean().item(),
        "spread of correlation between steps": between.std().item(),
    }


def score(data: Digits, x: Tensor) -> Tensor:
    """log p(7), by sample."""
    return data.classifier(x).log_softmax(1)[:, DIGIT]


def gradients(data: Digits, source: str, solver: str, steps: int, seed: int) -> dict[str, float]:
    """Of log p(7) to z0: its norm, and the cosine between those of two draws of the noise."""
    found = []
    for draw in range(2):
        z0 = normal(16, 3000 + seed).requires_grad_()
        x = run(data, z0, steps, SOURCES[source](10 * seed + draw), solver)
        found.append(torch.autograd.grad(score(data, x).sum(), z0)[0].flatten(1))
    cosine = F.cosine_similarity(*found, dim=1).mean().item()
    return {
        "gradient norm": torch.cat(found).norm(dim=1).median().item(),
        "cosine over draws": cosine,
    }


def optimisation(
    data: Digits, source: str, solver: str, updates: int, seed: int
) -> dict[str, float]:
    """Adam on z0 for log p(7), with the noise fixed; then with noise that it has not seen."""
    z0 = normal(16, 4000 + seed).requires_grad_()
    levels = gs.schedules.karras(20, final="zero")
    options = SOLVERS[solver] | {"noise": SOURCES[source](seed)}
    found = gs.optimize(
        data.denoise,
        z0,
        levels,
        lambda x: -score(data, x).mean(),
        regularizer=gs.regularizers.ChiNorm(0.02),
        steps=updates,
        **options,
    )
    with torch.no_grad():
        other = run(data, found.z0, 20, SOURCES[source](seed + 500), solver)
    losses = [step.loss for step in found.history]
    reached = next((k for k, loss in enumerate(losses) if loss < 0.1), updates)
    return {
        "p(7) after optimisation": score(data, found.sample).exp().mean().item(),
        "p(7) with other noise": score(data, other).exp().mean().item(),
        "updates until the loss is 0.1": float(reached),
    }


class Table:
    """Rows of what measurements find over seeds; kept as soon as they are measured."""

    def __init__(self, cores: str, keep: bool) -> None:
        self.cores, self.keep = cores, keep

    def add(self, source: str, where: str, measure: Callable[[int], Any], seeds: int) -> None:
        found = [measure(seed) for seed in range(seeds)]
        table = []
        for metric in found[0]:
            values = [each[metric] for each in found]
            spread = statistics.median(values), min(values), max(values)
            shape = f"{where}, {self.cores}"
            table.append(rows.row("noise", source, shape, "float32", metric, "1", spread))
        if self.keep:
            rows.append(table)
        told = "  ".join(f"{metric} {value:.3g}" for metric, value in found[0].items())
        print(f"noise {source:12} {where:36} {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--cores", default="quiet cores", help="what the row says of them")
    arguments = parser.parse_args()
    small = arguments.rehearse
    counts, seeds, updates = ((10,), 1, 2) if small else (COUNTS, 3, 40)
    table, digits = Table(arguments.cores, keep=not small), Digits()
    for source in SOURCES:
        table.add(source, "noises 1x8x8 N=50", partial(correlations, source), seeds)
    for solver, source in itertools.product(("heun, churn", "euler_ancestral"), SOURCES):
        where = f"optimisation digits {solver} N=20"
        table.add(source, where, partial(optimisation, digits, source, solver, updates), seeds)
    for steps, solver, source in itertools.product(counts[::2], SOLVERS, SOURCES):
        where = f"gradient digits {solver} N={steps}"
        table.add(source, where, partial(gradients, digits, source, solver, steps), seeds)
    for name, data, chosen in (
        ("digits", digits, counts[::2]),
        ("gaussian", GAUSSIAN, counts),
        ("mixture", MIXTURE, counts),
    ):
        for steps, solver, source in itertools.product(chosen, SOLVERS, SOURCES):
            where = f"{name} {solver} N={steps}"
            table.add(source, where, partial(quality, name, data, source, solver, steps), seeds)


if __name__ == "__main__":
    main()
