# SPDX-License-Identifier: Apache-2.0
"""What every backend must agree on: the Python module against the C++ header and the schemas."""

import re
from pathlib import Path

import pytest
import torch

from gradsampler import contract

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="the C++ sources are not here")


def code(name):
    return re.sub(r"//.*", "", (CSRC / name).read_text())


def enums():
    """The enumerations of the header: name -> names of its values, which count from 0."""
    found = re.findall(r"enum (\w+) : \w+ \{([^}]*)\}", code("contract.h"))
    assert not any("=" in body for _, body in found)
    return {name: [each.strip() for each in body.split(",")] for name, body in found}


def camel(name):
    return "k" + name.title().replace("_", "")


def test_the_header_says_what_the_module_says():
    kinds = {"OFF": "kOff", "SINCOS": "kSinCos", "SIGNED_ROLL": "kSignedRoll", "GIVEN": "kGiven"}
    uses = ("NORMALS", "SIGNS", "OFFSETS")
    assert [getattr(contract, name) for name in kinds] == [0, 1, 2, 3]
    assert [getattr(contract, name) for name in uses] == [0, 1, 2]
    assert enums() == {
        "Kind": list(kinds.values()),
        "Word": [*map(camel, contract.WORDS), "kWords"],
        "Number": [*map(camel, contract.NUMBERS), "kNumbers"],
        "Use": [camel(name) for name in uses],
        "Coefficient": [*map(camel, contract.ANCESTRAL), "kAncestral"],
    }
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", code("contract.h")))
    assert constants == {"kMaxTerms": str(contract.MAX_TERMS)}


def schema(op):
    """The arguments of a native op as C++ registers it."""
    text = code("schemas.cpp")
    injected = re.search(r'#define GS_INJECTED "([^"]*)"', text)[1]
    text = "".join(re.findall(r'"([^"]*)"', text.replace("GS_INJECTED", f'"{injected}"')))
    return [each.split()[-1] for each in re.search(rf"(?<!\w){op}\((.*?)\) ->", text)[1].split(",")]


@pytest.mark.parametrize(
    ("op", "grads", "split"),
    [
        ("step_bwd", contract.StepGrads, {}),
        ("ancestral_step_bwd", contract.AncestralGrads, {"model_output": ["deps", "dv"]}),
        ("flow_pair_bwd", contract.FlowPairGrads, {}),
    ],
)
def test_the_native_ops_write_the_gradients_of_the_contract(op, grads, split):
    written = [each for name in grads._fields for each in split.get(name, [f"d{name}"])]
    names = [re.sub(r"\(.*?\)", "", name) for name in schema(op)]
    extra = {"dz0"} if op == "step_bwd" else set()  # is added to what the caller has
    assert {name for name in names if re.match(r"d[a-z]", name)} == {*written, *extra}


def test_the_numbers_of_a_draw_are_said_once():
    """No other file gives the kinds or the most terms a value of its own."""
    names = "OFF|SINCOS|SIGNED_ROLL|GIVEN|MAX_TERMS|k(Off|SinCos|SignedRoll|Given|MaxTerms)"
    value = re.compile(rf"\b({names})\b(, \w+)* = (tl\.constexpr\()?(range|\d)")
    files = [p for folder in ("gradsampler", "kernels", "csrc") for p in (ROOT / folder).rglob("*")]
    sources = [p for p in files if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    said = {p.relative_to(ROOT).as_posix() for p in sources if value.search(p.read_text())}
    assert said == {"gradsampler/contract.py", "csrc/contract.h"}


FULL = contract.Draw(1, 2, 2**63 + 3, 4, 2**64 - 5, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0)


def test_a_draw_travels_as_two_lists_in_the_order_of_the_contract():
    words, numbers = FULL.lists
    words = dict(zip(contract.WORDS, words, strict=True))
    assert words == {"kind": 1, "step": 2, "seed": 3 - 2**63, "offset": 4, "normal_seed": -5}
    numbers = dict(zip(contract.NUMBERS, numbers, strict=True))
    names = ("weight", "gain", "rate", "amplitude", "phase", "normal")
    assert numbers == dict(zip(names, (6.0, 7.0, 8.0, 9.0, 10.0, 11.0), strict=True))
    assert {*contract.WORDS, *contract.NUMBERS, "given"} == set(contract.Draw._fields)


def test_a_draw_comes_back_from_its_lists():
    given = torch.zeros(2)
    draw = FULL._replace(given=given)
    back = contract.Draw.of(*draw.lists, given)
    assert back[:-1] == FULL[:-1]
    assert back.given is given
