# SPDX-License-Identifier: Apache-2.0
"""Which backends are named, chosen and refused, and what `gradsampler doctor` says of them."""

import subprocess
import sys

import pytest
import torch

import gradsampler as gs
from gradsampler.app import cli
from gradsampler.ops import backends, native

CPU, GPU = torch.device("cpu"), torch.device("cuda")
REASON = "no C++ compiler (c++) was found"


@pytest.fixture
def without_extension(monkeypatch):
    """The package as it is where nothing was compiled."""
    monkeypatch.setattr(native, "_reason", REASON)
    for cached in (backends._cpu, backends._cuda):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (backends._cpu, backends._cuda):
        cached.cache_clear()


def test_all_four_are_named():
    found = backends.available()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert all(found.values())
    assert backends.present("reference")


def test_the_fastest_one_for_the_cpu():
    expected = "cpu" if native.available() is None else "reference"
    assert backends.choose(None, CPU).name == expected


def test_the_fastest_one_for_the_gpu():
    expected = next((n for n in ("triton", "cuda") if backends.present(n)), "reference")
    assert backends.choose(None, GPU).name == expected
    assert backends.choose(None, torch.device("mps")) is backends.REFERENCE


def test_without_the_extension_the_reason_is_told(without_extension):
    assert backends.available()["cpu"] == backends.available()["cuda"] == REASON
    assert backends.choose(None, CPU) is backends.REFERENCE
    with pytest.raises(ValueError, match=r"backend must be present, got 'cpu', .*no C\+\+ comp"):
        gs.sample(lambda x, s: x, torch.zeros(1, 2), gs.schedules.karras(2), backend="cpu")
    assert native.facts() == {}
    assert native.isas() == []


def test_a_backend_refuses_tensors_of_another_device():
    if backends.present("cpu"):
        with pytest.raises(ValueError, match="backend must serve tensors on cuda, got 'cpu'"):
            backends.choose("cpu", GPU)
    if backends.present("cuda"):
        with pytest.raises(ValueError, match="backend must serve tensors on cpu, got 'cuda'"):
            backends.choose("cuda", CPU)
    else:
        with pytest.raises(ValueError, match="backend must be present, got 'cuda', which is not"):
            backends.choose("cuda", GPU)


def test_every_backend_has_the_functions_of_the_reference():
    fields = list(backends.Backend.__dataclass_fields__)[1:-1]  # but its name and a number
    for name in filter(backends.present, backends.available()):
        device = GPU if name == "cuda" or torch.cuda.is_available() else CPU
        if name not in ("cpu", "reference"):
            continue
        backend = backends.choose(name, CPU if name == "cpu" else device)
        assert all(callable(getattr(backend, field)) for field in fields)


def test_importing_the_package_loads_no_extension():
    code = (
        "import sys, gradsampler, gradsampler.app.cli\n"
        "assert not {'gradsampler._C', 'gradsampler.ops.native'} & set(sys.modules)\n"
        "gradsampler.backends.available()\n"
        "assert 'gradsampler.ops.native' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=120)
    assert done.returncode == 0


def test_doctor_names_every_backend_and_the_build(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"gradsampler {gs.__version__}, torch {torch.__version__}" in shown
    for name, found in backends.available().items():
        state = "here  " if backends.present(name) else "absent"
        assert f"  {name:10} {state}  {found}\n" in shown
    assert f"used on cpu tensors: {backends.choose(None, CPU).name}\n" in shown
    if native.available() is None:
        facts = native.facts()
        for fact in ("compiler", "isa", "threads", "torch"):
            assert f"  {fact:12} {facts[fact]}\n" in shown
        assert "  cuda_archs " in shown


def test_doctor_says_why_there_is_no_extension(without_extension, capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"  cpu        absent  {REASON}\n" in shown
    assert f"native extension:\n  absent: {REASON}\n" in shown
    assert "used on cpu tensors: reference\n" in shown
