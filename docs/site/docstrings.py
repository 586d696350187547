# SPDX-License-Identifier: Apache-2.0
"""Docstrings as the reference shows them: the sources stay as ``help()`` is read best."""

import re
from itertools import takewhile
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
LITERAL = re.compile(r"(``.+?``|`[^`]+`)")
SHAPE = re.compile(r"(?<![\w\])])\[([\w*+]+(?:, (?:\*?\w+|\.\.\.))*)\](?![\w(])")
POWER = re.compile(r"(?<=\w)\*\*(?=\w)")
GROUP = re.compile(r"( +)((?:\*{0,2}\w+, )+\*{0,2}\w+): (.*)")


def depth(line: str) -> int:
    """How far a line is indented; an empty one as far as can be."""
    return len(line) - len(line.lstrip()) if line.strip() else 1000


def within(lines: list[str], margin: int) -> list[str]:
    """The first lines, as long as they are indented deeper than by ``margin``."""
    return list(takewhile(lambda line: depth(line) > margin, lines))


def literal(line: str) -> str:
    """A line with shapes, such as [B, *state], as literals, but not inside of one."""
    if ">>>" in line:
        return line
    parts = LITERAL.split(line)
    return "".join(
        part if k % 2 else POWER.sub(r"\\*\\*", SHAPE.sub(r"`[\1]`", part))
        for k, part in enumerate(parts)
    )


def one_by_one(lines: list[str]) -> list[str]:
    """Arguments that share a description, ``a, b: text``, each on a line of its own."""
    found, k = [], 0
    while k < len(lines):
        group = GROUP.fullmatch(lines[k])
        if group is None:
            found.append(lines[k])
            k += 1
            continue
        margin, names, text = group.groups()
        first, *others = names.split(", ")
        rest = within(lines[k + 1 :], len(margin))
        found += [f"{margin}{first}: {text}", *rest]
        found += [f"{margin}{name}: as `{first}`." for name in others]
        k += 1 + len(rest)
    return found


def arguments(lines: list[str]) -> list[str]:
    """The same within the sections of arguments alone."""
    starts = [k for k, line in enumerate(lines) if line.strip() == "Args:"]
    for start in reversed(starts):
        inside = within(lines[start + 1 :], depth(lines[start]))
        lines[start + 1 : start + 1 + len(inside)] = one_by_one(inside)
    return lines


class Docstrings(griffe.Extension):
    """Names the sections as griffe does, and has a description for each argument."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = "\n".join(map(literal, arguments(text.split("\n"))))
