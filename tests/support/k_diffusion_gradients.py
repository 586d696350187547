# SPDX-License-Identifier: Apache-2.0
"""What autograd makes of k-diffusion's sampling functions, and their signatures, recorded.

    pip install --no-deps k-diffusion==0.1.1.post1
    PYTHONPATH=tests python tests/support/k_diffusion_gradients.py  # writes the files anew

The functions are called without their no_grad. The gradient of sigmas is NaN in some and detached
in others; for these there are quotients of differences, of the functions as they are.
"""

import inspect
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from support import k_diffusion_table as table

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILE = FIXTURES / "k_diffusion_gradients.json"
SIGNATURES = FIXTURES / "k_diffusion_signatures.json"

X = table.LEVELS["to-zero"][0] * table.Z0
WEIGHTS = table.numbers(1, 2.2)[0]
GAIN, SHIFT = 0.9, [0.3, -0.2, 0.5]
OWN_LEVELS = ("dpm_fast", "dpm_adaptive")
NO_SAMPLER = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")


def model(gain: Tensor):
    """A denoiser with a parameter and a keyword argument."""

    def denoise(x: Tensor, sigma: Tensor, *, shift: Tensor) -> Tensor:
        square = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
        return (x + square * gain * torch.tanh(x - shift)) / (1 + square)

    return denoise


def leaves(levels):
    """The state, the parameter, the keyword argument and the levels, requiring grad."""
    values = X.tolist(), GAIN, SHIFT, levels
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def called(function, name, options, x, gain, shift, sigmas, **more):
    """The sample of a function of k-diffusion's form; ``sigmas`` are its levels or their ends."""
    options = {**options, **more, "extra_args": {"shift": shift}, "disable": True}
    if name in OWN_LEVELS:
        return function(model(gain), x, sigmas[1], sigmas[0], **options)
    return function(model(gain), x, sigmas, **options)


class Watched:
    """Noise in order, and what its sampler and a callback were told."""

    def __init__(self):
        self.supply, self.asked, self.told = iter(table.NOISES), [], []

    def noise(self, sigma, sigma_next):
        self.asked.append([float(sigma), float(sigma_next)])
        return next(self.supply)

    def callback(self, info):
        plain = {k: v for k, v in info.items() if k not in ("x", "denoised")}
        sums = {k: float((info[k] * WEIGHTS).sum()) for k in ("x", "denoised")}
        self.told.append({k: float(v) for k, v in plain.items()} | sums)


def recorded(module, name, levels, options):
    """One row."""
    function = getattr(module, f"sample_{name}")
    ends = [levels[0], levels[-1]] if name in OWN_LEVELS else levels
    wanted = leaves(ends)
    with table.drawn(table.NOISES) as sampler:
        more = {} if name in NO_SAMPLER else {"noise_sampler": sampler}
        plain = wanted if name not in OWN_LEVELS else [*wanted[:3], ends]
        x = called(function.__wrapped__, name, options, *plain, **more)
        gradients = torch.autograd.grad((x * WEIGHTS).sum(), wanted, allow_unused=True)
    watched = Watched()
    with table.drawn(table.NOISES):
        more = {} if name in NO_SAMPLER else {"noise_sampler": watched.noise}
        plain = [*wanted[:3], ends] if name in OWN_LEVELS else wanted
        called(function, name, options, *plain, callback=watched.callback, **more)
    row = {"function": name, "levels": levels, "options": options, "result": x.tolist()}
    row |= dict(zip(("dx", "dgain", "dshift"), (g.tolist() for g in gradients), strict=False))
    row["dsigmas"] = None if gradients[3] is None else numbers(gradients[3].tolist())
    if name != "dpm_adaptive":
        row["quotients"] = quotients(function, name, options, ends)
    return row | {"asked": watched.asked, "told": watched.told}


def numbers(values):
    """NaN has no place in JSON."""
    return [v if math.isfinite(v) else None for v in values]


def quotients(function, name, options, levels):
    """By positive level, a central difference of fourth order."""

    def value(k, h):
        moved = [s + h * (i == k) for i, s in enumerate(levels)]
        x, gain, shift, sigmas = leaves(moved)
        sigmas = moved if name in OWN_LEVELS else sigmas
        with table.drawn(table.NOISES) as sampler:
            more = {} if name in NO_SAMPLER else {"noise_sampler": sampler}
            return float(
                (called(function, name, options, x, gain, shift, sigmas, **more) * WEIGHTS).sum()
            )

    found = []
    for k, s in enumerate(levels):
        h = 1e-3 * s
        if h > 0:
            near, far = (value(k, j * h) - value(k, -j * h) for j in (1, 2))
            found.append((8 * near - far) / (12 * h))
    return found


def rows(module):
    """All runs; those over rising levels as well, for the methods that take them."""
    rising = [0.1, 0.4, 1.0, 2.5]
    runs = [
        (name, levels, options)
        for name, cases in table.RUNS.items()
        for options in cases
        for levels in table.LEVELS.values()
        if levels[-1] > 0 or name not in OWN_LEVELS
    ]
    runs += [(name, rising, {}) for name in ("euler", "heun", "dpm_2")]
    runs += [("dpm_fast", rising, {"n": 8}), ("euler", table.LEVELS["to-zero"], WINDOW)]
    return [recorded(module, name, levels, options) for name, levels, options in runs]


WINDOW = {"s_churn": 1.1, "s_tmin": 0.5, "s_tmax": 5.0}


def signature(function):
    """Names and defaults of the parameters."""
    return [[p.name, default(p.default)] for p in inspect.signature(function).parameters.values()]


def default(value):
    if value is inspect.Parameter.empty:
        return "required"
    return "a function" if callable(value) else repr(value)


def signatures(module):
    """Those of a module's functions, and of the methods of its classes."""
    found = {}
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            found[name] = signature(value)
        elif inspect.isclass(value):
            found[name] = {k: signature(getattr(value, k)) for k in methods(value)}
    return found


def methods(kind):
    """What of a class is called."""
    own = [k for each in kind.__mro__ for k in vars(each) if each.__module__ == kind.__module__]
    kept = {k for k in own if not k.startswith("_") or k in ("__init__", "__call__")}
    return sorted(k for k in kept if callable(getattr(kind, k)))


def written(value):
    """JSON with one entry a line."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]\n"
    return (
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}\n"
    )


if __name__ == "__main__":
    sampling = table.sampling()
    FILE.write_text(written(rows(sampling)))
    SIGNATURES.write_text(written(signatures(sampling) | signatures(table.external())))
