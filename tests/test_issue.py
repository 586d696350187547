# SPDX-License-Identifier: Apache-2.0
"""The model of an NVIDIA multiprocessor's units that the kernels' budget goes by."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def issue(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import issue

    yield issue
    sys.modules.pop("issue")


@pytest.mark.parametrize(
    ("instruction", "unit"),
    [
        ("FFMA", "float"), ("FADD.FTZ", "float"), ("IMAD.MOV.U32", "float"),
        ("IMAD.WIDE.U32", "multiply"), ("IMAD.HI.U32", "multiply"), ("IMAD", "multiply"),
        ("LOP3.LUT", "logic"), ("IADD3.X", "logic"), ("SHF.L.U32", "logic"), ("PRMT", "logic"),
        ("I2FP.F32.U32", "logic"), ("F2FP.BF16.F32.PACK_AB", "logic"), ("ISETP.GE.AND", "logic"),
        ("MUFU.SIN", "special"), ("F2F.BF16.F32", "special"), ("I2F.RP", "special"),
        ("LDG.E.128", "memory"), ("STG.E", "memory"), ("LDS.128", "memory"), ("SHFL.IDX", "memory"),
        ("LDC", None), ("ULDC.64", None), ("UIADD3", None), ("BRA", None), ("EXIT", None),
    ],
)  # fmt: skip
def test_units(issue, instruction, unit):
    assert issue.unit(instruction) == unit


def test_the_busiest_unit(issue):
    code = ["FFMA"] * 8 + ["LOP3.LUT"] * 4 + ["MUFU.SIN"] + ["BRA"]
    assert issue.busiest(code, 2) == ("issue", 7.0)  # 14 instructions of two elements
    assert issue.busiest([*code, "LOP3.LUT", "LOP3.LUT", "SHF", "SHF", "SHF"], 2) == ("issue", 9.5)
    assert issue.busiest(["LOP3.LUT"] * 6 + ["FFMA"] * 2, 2) == ("logic", 6.0)
    assert issue.busiest(["MUFU.SIN"] * 2 + ["FFMA"] * 4, 2) == ("special", 8.0)
