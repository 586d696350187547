# SPDX-License-Identifier: Apache-2.0
"""The error of a difference quotient against its step, beside a right and a wrong backward.

python examples/wrong_gradients.py --out wrong-gradients.png
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
COLOURS = {"float64": "#1b5e8c", "float32": "#2a9d5c", "bfloat16": "#d1495b"}
OFF = 1.02


class Scaled(torch.autograd.Function):
    """The identity, with a backward that is off by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * g, None


def errors(dtype: torch.dtype, factor: float, steps: list[float]) -> list[float]:
    """Relative errors of autograd's derivative along a direction, by the step of the quotient."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).to(dtype)
    x = torch.randn(64, 16, dtype=torch.float64)
    direction = torch.randn(64, 16, dtype=torch.float64)
    point = x.to(dtype).requires_grad_()
    output = network(Scaled.apply(point, factor))

    @torch.no_grad()
    def at(h: float) -> tuple[Tensor, Tensor]:
        moved = (x + h * direction).to(dtype)
        return network(moved).double(), moved.double()

    (ahead, _), (behind, _) = at(0.5), at(-0.5)
    cotangent = (ahead - behind) / (ahead - behind).norm()
    (gradient,) = torch.autograd.grad(output, point, cotangent.to(dtype))
    cotangent = cotangent.to(dtype).double()
    found = []
    for h in steps:
        (ahead, there), (behind, back) = at(h), at(-h)
        difference = float((cotangent * (ahead - behind)).sum())
        autograd = float((gradient.double() * (there - back)).sum())
        found.append(abs(autograd / difference - 1) if difference else 1.0)
    return found


def draw(path: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [10.0 ** (-k / 4) for k in range(33)]
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, dtype in DTYPES.items():
        plain = {"color": COLOURS[name], "lw": 1.4}
        axes.loglog(steps, errors(dtype, 1.0, steps), label=name, **plain)
        axes.loglog(steps, errors(dtype, OFF, steps), ls=":", **plain)
    axes.axhline(OFF - 1, color="0.75", lw=0.8, zorder=0)
    axes.text(
        2e-4, 3e-12, "dotted: a backward that is off by two per cent", fontsize=8, color="0.3"
    )
    axes.set(xlabel="step of the quotient", ylabel="autograd's relative error", ylim=(1e-13, 3))
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("wrong-gradients.png"))
    arguments = parser.parse_args()
    draw(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
