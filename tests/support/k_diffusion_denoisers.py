# SPDX-License-Identifier: Apache-2.0
"""What k-diffusion's denoisers and schedules give, recorded in a table.

pip install --no-deps k-diffusion==0.1.1.post1
PYTHONPATH=tests python tests/support/k_diffusion_denoisers.py  # writes the file anew
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from support import k_diffusion_table as table

FILE = Path(__file__).parents[1] / "fixtures" / "k_diffusion_denoisers.json"
ALPHAS = torch.cumprod(1 - torch.linspace(1e-3, 0.12, 40, dtype=torch.float64), 0)
X = table.numbers(1, 0.4)[0].view(2, 3, 1, 1) * 2
NOISE = table.numbers(1, 1.9)[0].view(2, 3, 1, 1)
SIGMAS = torch.tensor([0.31, 2.4], dtype=torch.float64)  # between timesteps
WEIGHTS = table.numbers(1, 2.2)[0].view(2, 3, 1, 1)


class Network(nn.Module):
    """A small network that is told a time of any scale."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width, self.alphas_cumprod = width, ALPHAS

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        time = torch.sin(t.to(x) / 7).view(-1, 1, 1, 1)
        return torch.cat([torch.tanh(0.7 * x + time + cond)] * self.width, 1)

    apply_model = forward


def denoisers(external):
    """One of each kind."""
    diffusion = SimpleNamespace(alphas_cumprod=ALPHAS.tolist())
    return {
        "VDenoiser": external.VDenoiser(Network()),
        "DiscreteEpsDDPMDenoiser": external.DiscreteEpsDDPMDenoiser(Network(), ALPHAS, False),
        "DiscreteEpsDDPMDenoiser-quantize": external.DiscreteEpsDDPMDenoiser(
            Network(), ALPHAS, True
        ),
        "DiscreteVDDPMDenoiser": external.DiscreteVDDPMDenoiser(Network(), ALPHAS, False),
        "DiscreteVDDPMDenoiser-quantize": external.DiscreteVDDPMDenoiser(Network(), ALPHAS, True),
        "OpenAIDenoiser": external.OpenAIDenoiser(Network(2), diffusion),
        "OpenAIDenoiser-plain": external.OpenAIDenoiser(
            Network(), diffusion, has_learned_sigmas=False
        ),
        "CompVisDenoiser": external.CompVisDenoiser(Network()),
        "CompVisVDenoiser": external.CompVisVDenoiser(Network()),
    }


def row(denoiser) -> dict[str, list]:
    """What one gives, with its gradients."""
    x, sigma = X.clone().requires_grad_(), SIGMAS.clone().requires_grad_()
    cond = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    d = denoiser(x, sigma, cond=cond)
    dx, dsigma, dcond = torch.autograd.grad((d * WEIGHTS).sum(), [x, sigma, cond])
    found = {
        "denoised": d,
        "dx": dx,
        "dsigma": dsigma,
        "dcond": dcond,
        "loss": denoiser.loss(X, NOISE, SIGMAS, cond=cond),
        "scalings": torch.stack(list(denoiser.get_scalings(SIGMAS))),
        "times": denoiser.sigma_to_t(SIGMAS).double(),
        "levels": denoiser.t_to_sigma(torch.tensor([0.2, 0.7])),
    }
    if hasattr(denoiser, "get_sigmas"):
        found |= {
            "get_sigmas": denoiser.get_sigmas(5),
            "get_all": denoiser.get_sigmas(),
            "ends": torch.stack([denoiser.sigma_min, denoiser.sigma_max]),
            "nearest": denoiser.sigma_to_t(SIGMAS, quantize=True),
        }
    return {name: value.tolist() for name, value in found.items()}


SCHEDULES = {
    "get_sigmas_karras": [(5, 0.03, 14.6), (3, 0.1, 10.0, 3.0)],
    "get_sigmas_exponential": [(5, 0.03, 14.6)],
    "get_sigmas_polyexponential": [(5, 0.03, 14.6), (5, 0.03, 14.6, 0.7)],
    "get_sigmas_vp": [(5,), (4, 15.0, 0.2, 0.01)],
}
STEPS = [(5.0, 2.0), (5.0, 2.0, 0.4), (5.0, 0.0), (5.0, 2.0, 3.0), (5.0, 2.0, 0.0)]
LEVELS = [5.0, 3.0, 1.2, 0.5, 0.1, 0.0]


def schedules(sampling) -> dict[str, list]:
    """The schedules, and what is made of levels."""
    found = {
        f"{name}{arguments}": getattr(sampling, name)(*arguments).tolist()
        for name, cases in SCHEDULES.items()
        for arguments in cases
    }
    for s, t, *eta in STEPS:
        levels = torch.tensor(s, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
        found[f"step{(s, t, *eta)}"] = [
            float(x) for x in sampling.get_ancestral_step(*levels, *eta)
        ]
    found["multistep"] = [
        float(sampling.linear_multistep_coeff(order, LEVELS, 3, j))
        for order in (1, 2, 3, 4)
        for j in range(order)
    ]
    found["to_d"] = sampling.to_d(X, SIGMAS, NOISE).tolist()
    return found


def rows(sampling, external):
    """The whole table."""
    return {"schedules": schedules(sampling)} | {k: row(d) for k, d in denoisers(external).items()}


if __name__ == "__main__":
    found = rows(table.sampling(), table.external())
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
