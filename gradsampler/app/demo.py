# SPDX-License-Identifier: Apache-2.0
"""The main job on the shipped digits model: optimise noise through a stochastic run, show it."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsampler import _checks, models, schedules, solvers
from gradsampler._version import __version__
from gradsampler.app import picture
from gradsampler.noise.sources import NoiseSource, SignedRoll
from gradsampler.optimization import regularizers
from gradsampler.optimization.optimize import OptimizeResult, optimize
from gradsampler.optimization.team import Team
from gradsampler.parameterization import EDM
from gradsampler.sampling import sample
from gradsampler.solvers import Churn


class Objective(ABC):
    """What the optimised samples should become."""

    maximize = False

    def begin(self, baseline: Tensor) -> None:
        """Takes the samples [B, 1, 8, 8] of the starting noise."""
        self.baseline = baseline

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """The loss of samples [B, 1, 8, 8], a scalar."""

    @abstractmethod
    def measured(self, x: Tensor) -> dict[str, float]:
        """What samples are judged by, by name."""


class Digit(Objective):
    """Be read as one digit by the shipped classifier."""

    def __init__(self, demo: "Demo") -> None:
        if not 0 <= demo.digit <= 9:
            _checks.fail("--digit", "be one of 0 .. 9", demo.digit)
        self._digit = demo.digit
        self._classifier = models.load_classifier()

    def loss(self, x: Tensor) -> Tensor:
        target = torch.full((len(x),), self._digit)
        return F.cross_entropy(self._classifier(x), target)

    def measured(self, x: Tensor) -> dict[str, float]:
        p = self._classifier(x).softmax(1)[:, self._digit]
        name = f"p({self._digit})"
        return {f"mean {name}": p.mean().item(), f"least {name}": p.min().item()}


class Diverge(Objective):
    """Differ from the baseline sample of the same start, as far as the denoiser lets it."""

    maximize = True

    def __init__(self, demo: "Demo") -> None:
        pass

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(x, self.baseline)

    def measured(self, x: Tensor) -> dict[str, float]:
        return {"mean squared difference from the baseline": self.loss(x).item()}


class Match(Objective):
    """Look like a picture."""

    def __init__(self, demo: "Demo") -> None:
        if demo.image is None:
            _checks.fail("--image", "be given with --objective match", None)
        self._target = models.from_pixels(picture.grey(demo.image, size=8))

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(x, self._target.expand_as(x))

    def measured(self, x: Tensor) -> dict[str, float]:
        return {"mean squared difference from the picture": self.loss(x).item()}


OBJECTIVES: dict[str, Callable[["Demo"], Objective]] = {
    "digit": Digit,
    "diverge": Diverge,
    "match": Match,
}


@dataclass(frozen=True)
class Demo:
    """Settings of the main job."""

    objective: str = "digit"
    digit: int = 7
    image: Path | None = None
    starts: int = 16
    iterations: int = 50  # updates of the noise
    lr: float = 0.1
    solver: str = "res_2ab"
    steps: int = 35  # sampler steps
    noise: NoiseSource = field(default_factory=SignedRoll)
    memory: str = "checkpoint"
    seed: int = 0

    def run(self, out: Path, *, progress: bool = True, group: Any = None) -> str:
        """Optimises, and writes ``<objective>.png`` and ``.json`` into the folder ``out``.

        While it runs, ``<objective>.checkpoint`` there holds the last completed update; a run that
        was interrupted goes on from it. The ranks of a process group share the starting noises; the
        first of them writes the files.

        Returns:
            A few lines that say what was reached and where the files are; nothing on other ranks.
        """
        settings = self._sample_settings()
        make = OBJECTIVES[_checks.choice("--objective", self.objective, OBJECTIVES)]
        objective = make(self)
        _writable(out)
        generator = torch.Generator().manual_seed(self.seed)
        z0 = torch.randn(self.starts, 1, 8, 8, generator=generator).requires_grad_()
        levels = schedules.karras(self.steps)
        network = models.load_network()
        denoiser = EDM(network, network.sigma_data)
        with torch.no_grad():
            baseline = sample(denoiser, z0, levels, **settings)
        team = Team(group, self.starts)
        objective.begin(team.own(baseline))
        checkpoint = out / f"{self.objective}.checkpoint"
        result = optimize(
            denoiser,
            z0,
            levels,
            objective.loss,
            steps=self.iterations,
            lr=self.lr,
            maximize=objective.maximize,
            regularizer=regularizers.ChiNorm(0.5),
            checkpoint=checkpoint,
            identity={"objective": self.objective, "digit": str(self.digit), **self._image()},
            progress=progress,
            group=group,
            **settings,
        )
        if team.rank > 0:
            return ""
        objective.begin(baseline)
        report = self._written(out, objective, baseline, result)
        checkpoint.unlink()
        return report

    def _sample_settings(self) -> dict[str, Any]:
        """The sampler's settings: churn where the solver injects no noise of its own."""
        for name in ("starts", "iterations", "steps"):
            _checks.integer(f"--{name}", getattr(self, name), 1)
        if not _checks.finite("--lr", self.lr) > 0:
            _checks.fail("--lr", "be positive", self.lr)
        solver = solvers.resolve(self.solver)
        if getattr(solver, "eta", None) == 0:
            solver = solvers.resolve(solver, eta=1.0)  # the job is a run with noise
        churn = None if solver.stochastic else Churn(10.0)
        return {"solver": solver, "noise": self.noise, "churn": churn, "memory": self.memory}

    def _image(self) -> dict[str, str]:
        """The picture to match, by its bytes."""
        if self.image is None:
            return {}
        return {"image": hashlib.sha256(self.image.read_bytes()).hexdigest()[:16]}

    def _written(
        self, out: Path, objective: Objective, baseline: Tensor, result: OptimizeResult
    ) -> str:
        """Writes picture and history."""
        before, after = objective.measured(baseline), objective.measured(result.sample)
        norms = result.z0.flatten(1).norm(dim=1) / result.z0[0].numel() ** 0.5
        classifier = models.load_classifier()
        figure = out / f"{self.objective}.png"
        picture.before_after(
            figure,
            before=picture.read(classifier, baseline),
            after=picture.read(classifier, result.sample),
            losses=[step.loss for step in result.history],
            gradients=[step.gradient_norm for step in result.history],
        )
        history = out / f"{self.objective}.json"
        content = {
            "gradsampler": __version__,
            "torch": torch.__version__,
            "settings": {f.name: _plain(getattr(self, f.name)) for f in fields(self)},
            "before": before,
            "after": after,
            "norms": norms.tolist(),
            "history": [step._asdict() for step in result.history],
        }
        history.write_text(json.dumps(content, indent=1) + "\n")
        lines = [f"{name}: {before[name]:.4f} -> {value:.4f}" for name, value in after.items()]
        lines.append(f"|z0|/sqrt(d): {norms.min():.3f} to {norms.max():.3f}")
        lines.append(f"seconds: {sum(step.seconds for step in result.history):.1f}")
        return "\n".join([*lines, f"history: {history}", f"picture: {figure}"])


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _checks.fail("--out", "be a folder that can be made", f"{folder} ({error.strerror})")
    if not os.access(folder, os.W_OK):
        _checks.fail("--out", "be a writable folder", folder)


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | str | None) else str(value)
