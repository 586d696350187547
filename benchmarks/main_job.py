# SPDX-License-Identifier: Apache-2.0
"""The main job's figures on this machine: quality of the shipped model, optimisation, memory.

make bench
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import rows
import timing
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import gradsampler as gs
from gradsampler import gradient_flow, models
from gradsampler.app.demo import Demo

Rows = list[dict[str, str]]


def single(op: str, variant: str, shape: str, metric: str, unit: str, value: float) -> dict:
    print(f"{op:24} {variant:24} {shape:16} {metric:32} {value:.6g} {unit}", flush=True)
    return rows.row(op, variant, shape, "float32", metric, unit, (value,) * 3)


def quality(table: Rows, count: int) -> None:
    """Conditional samples that an SVM of real digits reads as their class."""
    digits = load_digits()
    reader = SVC(gamma=0.001).fit(digits.data, digits.target)
    network = models.load_network()
    labels = torch.arange(count) % 10
    z0 = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = gs.schedules.karras(18, final="zero")
    with torch.no_grad():
        x = gs.sample(
            gs.EDM(network, network.sigma_data), z0, levels, solver="heun", cond={"label": labels}
        )
    read = torch.as_tensor(reader.predict(16 * models.to_pixels(x).flatten(1).numpy()))
    share = (read == labels).double().mean().item()
    table.append(single("digits", "heun 18", f"{count}x1x8x8", "read as their class", "1", share))


def optimisation(table: Rows, updates: int) -> None:
    """`gradsampler optimize` with its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        Demo(iterations=updates).run(Path(folder), progress=False)
        seconds = time.perf_counter() - start
        found = json.loads((Path(folder) / "digit.json").read_text())
    shape = f"16x1x8x8 {updates} updates"
    table.append(single("optimize", "checkpoint", shape, "time", "s", seconds))
    table.append(
        single("optimize", "checkpoint", shape, "mean p(7)", "1", found["after"]["mean p(7)"])
    )
    for name, value in (("least", min(found["norms"])), ("greatest", max(found["norms"]))):
        table.append(single("optimize", "checkpoint", shape, f"{name} |z0|/sqrt(d)", "1", value))


def strategies(table: Rows, rounds: int) -> None:
    """Time of a gradient through 35 steps, by memory strategy."""
    network = models.load_network()
    denoiser, levels = gs.EDM(network, network.sigma_data), gs.schedules.karras(35)
    z0 = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(memory: str) -> object:
        x = gs.sample(denoiser, z0, levels, solver="res_2ab", churn=gs.Churn(10.0), memory=memory)
        return torch.autograd.grad(x.square().mean(), z0)

    found = timing.interleaved(
        {name: lambda name=name: gradient(name) for name in ("store", "checkpoint")}, rounds
    )
    for name, times in found.items():
        table.append(rows.row("gradient", name, "16x1x8x8 N=35", "float32", "time", "s", times))
    ratio = found["checkpoint"][0] / found["store"][0]
    table.append(single("gradient", "checkpoint", "16x1x8x8 N=35", "time over store", "1", ratio))


def check(table: Rows) -> None:
    """Own time of the gradient-flow check, both modes."""

    def both() -> None:
        for source in (gs.noise.Off(), gs.noise.SinCos()):
            z0 = torch.zeros(1, 2, 2, 8, 8).requires_grad_()
            gs.check(
                gradient_flow.affine_denoiser,
                z0,
                gs.schedules.karras(4),
                solver="res_2ab",
                noise=source,
                churn=gs.Churn(0.8),
                memory="checkpoint",
                directions=0,
            )

    times = timing.interleaved({"check": both}, 9)["check"]
    table.append(single("check", "both modes", "1x2x2x8x8", "own time", "s", times[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    small = parser.parse_args().rehearse
    table: Rows = []
    quality(table, 50 if small else 1000)
    optimisation(table, 2 if small else 50)
    strategies(table, 2 if small else 25)
    check(table)
    if not small:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
