# SPDX-License-Identifier: Apache-2.0
"""The code of the page about the k-diffusion drop-in runs, and what two pages say is so."""

import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import gradsampler.integrations.k_diffusion as K
from support import k_diffusion_table as table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "k-diffusion.md"


@cache
def after():
    """The names after all blocks of the page."""
    names: dict = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_code_runs_and_has_the_gradient_of_a_plain_loop():
    """DPM-Solver++(2M) in plain torch."""
    names = after()
    denoiser, sigmas = names["denoiser"], names["sigmas"]
    x = names["x"].detach().clone().requires_grad_()
    state, last = x, None
    for k in range(len(sigmas) - 1):
        s, t = sigmas[k], sigmas[k + 1]
        denoised = denoiser(state, s.expand(4), label=names["label"])
        mean, h = denoised, (s / t).log()
        if last is not None and t > 0:
            r = (sigmas[k - 1] / s).log() / h
            mean = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * last
        state, last = t / s * state + (1 - t / s) * mean, denoised
    (expected,) = torch.autograd.grad((state - 1).square().mean(), x)
    error = (names["gradient"] - expected).norm() / expected.norm()
    assert error < 1e-4  # float32 through twelve model calls
    for name in ("through_noise", "slopes", "dcond"):
        assert torch.isfinite(names[name]).all()
        assert names[name].norm() > 0


def test_the_names_on_the_page_are_there():
    text = PAGE.read_text()
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `K."))
    comfy = re.search(r"from ComfyUI \| `sample_` with (.*?), and the", rows)[1].split(", ")
    assert all(hasattr(K, f"sample_{name}") for name in comfy)
    named = re.findall(r"`(\w+)`", rows)
    for name in named:
        if not name.endswith("_"):
            found = any(hasattr(home, name) for home in (K.sampling, K.external))
            assert found or name == "_cfg_pp", name


def test_all_of_the_samplers():
    """The samplers of k-diffusion's own module, by the signatures recorded from it."""
    recorded = (ROOT / "tests" / "fixtures" / "k_diffusion_signatures.json").read_text()
    theirs = re.findall(r'^"(sample_\w+)"', recorded, re.MULTILINE)
    numbers = {12: "twelve", 13: "thirteen", 14: "fourteen"}
    assert f"all {numbers[len(theirs)]}, with" in PAGE.read_text()


@pytest.mark.thorough
@pytest.mark.skipif(not table.installed(), reason="k-diffusion is not installed")
def test_the_table_of_gradients_is_what_the_script_finds(monkeypatch):
    """Which are right, NaN, wrong, detached or errors; not the digits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gradients_compared as script

    found = script.table(script.compared())
    page = (ROOT / "docs" / "gradients-compared.md").read_text()
    written = page.split(script.BEGIN)[1].split("\n\n")[0].strip()

    def kinds(text):
        plain = re.sub(r"wrong by \d+ %", "wrong", text)
        return re.sub(r"\d+e[-+]\d+", "right", plain)

    assert kinds(found) == kinds(written)
    again = script.recomputed()
    assert again.popitem()[1] < 1e-12
    assert again.popitem()[1] > 0.1
