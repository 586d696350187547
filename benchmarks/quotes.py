# SPDX-License-Identifier: Apache-2.0
"""Figures that a page quotes one by one, each with the row that it is from.

A figure that a comment follows, ``0.97<!-- row: OP; VARIANT; SHAPE; METRIC -->``, is the median of
that row. After the metric may stand a dtype other than float32, and a unit: MiB, ms, us or %. The
comment does not show on the page. `figures.py` writes the figures anew.
"""

import re
from functools import cache

import rows

QUOTE = re.compile(r"(\d[\d.]*(?:e-?\d+)?)(<!-- row: (.*?) -->)", re.DOTALL)
UNITS = {"MiB": 2**20, "ms": 1e-3, "us": 1e-6, "%": 1e-2}


@cache
def median(op: str, variant: str, shape: str, metric: str, dtype: str) -> float:
    """Of the latest row; KeyError where there is none."""
    return float(rows.latest(op, dtype=dtype)[variant, shape, metric]["median"])


def value(named: str) -> float:
    """What a comment stands for."""
    op, variant, shape, metric, *rest = (
        part.strip() for part in " ".join(named.split()).split(";")
    )
    dtype = next((part for part in rest if part not in UNITS), "float32")
    unit = next((UNITS[part] for part in rest if part in UNITS), 1.0)
    return median(op, variant, shape, metric, dtype) / unit


def written(figure: str, found: float) -> str:
    """A number in the form of a figure: with its decimals, and with an exponent if it has one."""
    mantissa, _, exponent = figure.partition("e")
    decimals = len(mantissa.partition(".")[2])
    if exponent:
        return re.sub(r"e([+-])0*", lambda e: "e" + e[1].strip("+"), f"{found:.{decimals}e}")
    return f"{found:.{decimals}f}"


def updated(text: str) -> str:
    """A page with its quotes written anew."""
    return QUOTE.sub(lambda quote: written(quote[1], value(quote[3])) + quote[2], text)
