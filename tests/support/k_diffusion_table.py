# SPDX-License-Identifier: Apache-2.0
"""What k-diffusion's sampling functions give, recorded in tests/fixtures/k_diffusion.json.

    pip install --no-deps k-diffusion==0.1.1.post1
    python tests/support/k_diffusion_table.py         # writes the file anew

Its dependencies (torchvision, wandb, ...) are not needed: the sampling module alone is loaded, and
what it imports without using it here is replaced by empty modules.
"""

import importlib.util
import json
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).parents[1] / "fixtures" / "k_diffusion.json"

LEVELS = {
    "to-sigma_min": [10.0, 4.0, 1.5, 0.9, 0.31, 0.1],
    "to-zero": [10.0, 4.0, 1.5, 0.9, 0.31, 0.0],
}
CHURN = {"s_churn": 1.1, "s_noise": 1.003}
RUNS = {
    "euler": [{}, CHURN],
    "heun": [{}, CHURN],
    "dpm_2": [{}, CHURN],
    "lms": [{"order": k} for k in (1, 2, 3, 4)],
    "dpmpp_2m": [{}],
    "euler_ancestral": [{}, {"eta": 0.5, "s_noise": 0.8}],
    "dpm_2_ancestral": [{}, {"eta": 0.5, "s_noise": 0.8}],
    "dpmpp_2s_ancestral": [{}, {"eta": 0.5, "s_noise": 0.8}],
    "dpmpp_sde": [{}, {"eta": 0.5, "s_noise": 0.8}, {"r": 0.3}],
    "dpmpp_2m_sde": [{}, {"solver_type": "heun"}, {"eta": 0.5, "s_noise": 0.8}],
    "dpmpp_3m_sde": [{}, {"eta": 0.5, "s_noise": 0.8}],
    "dpm_fast": [
        {"n": 10},
        {"n": 11},
        {"n": 9},
        {"n": 2},
        {"n": 10, "eta": 0.7, "s_noise": 0.8},
    ],
    "dpm_adaptive": [
        {},
        {"order": 2, "rtol": 0.02},
        {"rtol": 1e-3, "atol": 1e-3, "h_init": 3.0},
        {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1, "accept_safety": 0.9},
        {"eta": 0.7, "s_noise": 0.8},
    ],
}


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth denoiser, element by element."""
    square = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
    return (x + square * torch.tanh(x)) / (1 + square)


def numbers(count: int, shift: float) -> Tensor:
    """[count, 2, 3] numbers of about unit size, the same everywhere."""
    k = torch.arange(count * 6, dtype=torch.float64)
    return (1.4 * torch.sin(2.4 * k + shift)).view(count, 2, 3)


Z0 = numbers(1, 0.3)[0]
NOISES = numbers(60, 0.7)


def installed() -> bool:
    """Whether k-diffusion can be found; it is not imported."""
    return importlib.util.find_spec("k_diffusion") is not None


def sampling() -> types.ModuleType:
    """Its sampling module, without the rest of the package."""
    return loaded("k_diffusion.sampling")


def external() -> types.ModuleType:
    """Its module of denoisers, without the rest of the package."""
    return loaded("k_diffusion.external")


def loaded(module: str) -> types.ModuleType:
    """One of its modules, without what it imports and does not use here."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.origin is not None
    stubs = {name: types.ModuleType(name) for name in ("torchdiffeq", "torchsde", "k_diffusion")}
    stubs["torchdiffeq"].odeint = None
    stubs["k_diffusion"].__path__ = [str(Path(spec.origin).parent)]
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    stubs["k_diffusion.utils"] = stubs["k_diffusion"].utils = utils
    names = [*stubs, "k_diffusion.sampling", "k_diffusion.external"]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(stubs)
    try:
        return importlib.import_module(module)
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


@contextmanager
def drawn(noises):
    """Noise for the functions that draw it themselves, and numbers in double precision."""
    supply, kept, dtype = iter(noises), torch.randn_like, torch.get_default_dtype()
    torch.randn_like = lambda x: next(supply)
    torch.set_default_dtype(torch.float64)
    try:
        yield lambda sigma, sigma_next: next(supply)
    finally:
        torch.randn_like = kept
        torch.set_default_dtype(dtype)


def run(module, name, levels, options):
    """The result of one function; of the adaptive one also its accepted levels."""
    function = getattr(module, f"sample_{name}")
    options = dict(options)
    with drawn(NOISES) as sampler:
        if name not in ("euler", "heun", "dpm_2", "lms", "dpmpp_2m"):
            options["noise_sampler"] = sampler
        x = levels[0] * Z0
        if name in ("dpm_fast", "dpm_adaptive"):
            told = []
            options["callback"] = lambda info: told.append(float(info["sigma"]))
            x = function(denoise, x, levels[-1], levels[0], disable=True, **options)
            accepted = [b for a, b in zip([levels[0], *told], told, strict=False) if b < a]
            return {"result": x.tolist(), "accepted": accepted}
        sigmas = torch.tensor(levels)
        return {"result": function(denoise, x, sigmas, disable=True, **options).tolist()}


def table(module):
    """All runs."""
    return [
        {"function": name, "levels": levels, "options": options}
        | run(module, name, levels, options)
        for name, cases in RUNS.items()
        for options in cases
        for levels in LEVELS.values()
        if levels[-1] > 0 or name not in ("dpm_fast", "dpm_adaptive")
    ]


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in table(sampling()))
    FILE.write_text(f"[\n{rows}\n]\n")
