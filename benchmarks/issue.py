# SPDX-License-Identifier: Apache-2.0
"""Which unit of an NVIDIA multiprocessor executes an instruction, and how many lanes it takes.

The rates are those of the table of arithmetic throughput in the CUDA C++ Programming Guide for
compute capability 9.0. A multiprocessor issues to 128 lanes a cycle, so a unit of 64 is half-rate:
twice as many issue slots pass while it works.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

ISSUE = 128  # lanes a cycle
RATES = {
    "multiply": 64,  # of integers
    "float": 128,
    "logic": 64,  # additions, comparisons and shifts of integers, bits, selections, conversions
    "special": 16,  # sine, logarithm, root, and conversions of the old kind
    "memory": 32,
}
_UNITS = [
    ("multiply", r"IMAD(?!\.MOV|\.SHL|\.U32)|IDP|UIMAD"),
    ("special", r"MUFU|I2F(?!P)|F2F(?!P)|F2I|I2I|POPC|FLO"),
    ("float", r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|IMAD|FSWZADD"),
    ("memory", r"(LD|ST)[GSL]?\b|ATOM|RED\b|SHFL"),
    (
        "logic",
        r"LOP3|PLOP3|IADD3?|VIADD|ISETP|FSETP|FSEL|SEL|SHF|SHL|SHR|LEA|PRMT|IMNMX|VIMNMX|FMNMX|"
        r"IABS|SGXT|BMSK|I2FP|F2FP|FCHK|R2P|P2R",
    ),
]


class Share(NamedTuple):
    """The unit that is the last to be done, and the issue slots that pass until then."""

    unit: str  # "issue" where no unit takes longer than the issue itself
    slots: float  # an element


def unit(instruction: str) -> str | None:
    """The unit that executes a SASS instruction; None for those that only take an issue slot."""
    return next((name for name, known in _UNITS if re.match(known, instruction)), None)


def busiest(code: Iterable[str], elements: float) -> Share:
    """What a thread of ``elements`` elements waits for the longest, if memory were no matter."""
    counts = Counter(map(unit, code))
    slots = {"issue": counts.total() / elements}
    for name, rate in RATES.items():
        slots[name] = counts[name] / elements * ISSUE / rate
    name = max(slots, key=slots.__getitem__)
    return Share(name, slots[name])
