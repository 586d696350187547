# SPDX-License-Identifier: Apache-2.0
"""The table of all solvers, from the registry: ``python -m gradsampler.app.tables FILE`` puts it
between the two marks of a Markdown file.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from gradsampler import schedules, solvers
from gradsampler.engine.program import Program
from gradsampler.memory.leapfrog import Leapfrog
from gradsampler.parameterization import parameterize
from gradsampler.solvers import Solver

BEGIN, END = "<!-- solvers: begin -->", "<!-- solvers: end -->"
HEAD = (
    "solver",
    "method",
    "order",
    "weak order",
    "model calls a step",
    "noises a step",
    "flow time",
    "reversible",
    "learns",
)


def main(argv: Sequence[str]) -> None:
    """Brings the table in each of the files up to date."""
    for name in argv:
        path = Path(name)
        path.write_text(updated(path.read_text()))


def updated(text: str) -> str:
    """A Markdown text with the table as it is now between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def table() -> str:
    """The table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(name) for name in solvers.names())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(name: str) -> tuple[str, ...]:
    """What there is to say of one solver."""
    solver = solvers.resolve(name)
    program = _recorded(solver)
    middle = program.num_steps // 2
    calls = sum(evaluation.step == middle for evaluation in program.evaluations)
    leapfrog = Leapfrog.of(program)
    fields = [f.name for f in dataclasses.fields(solver)]  # type: ignore[arg-type]
    draws = str(_draws(program))
    if draws == "0" and "eta" in fields:
        noisy = dataclasses.replace(solver, eta=0.5)  # type: ignore[type-var]
        draws += f" ({_draws(_recorded(noisy))})"
    learns = ["levels", *(each for each in ("eta", "s_noise") if each in fields)]
    return (
        f"`{name}`",
        summary(solver),
        _number(solver.ode_order),
        _number(solver.weak_order),
        str(calls),
        draws,
        "yes" if solver.flow else "no",
        "yes" if leapfrog is not None and leapfrog.undone else "no",
        ", ".join(learns),
    )


def summary(solver: Solver) -> str:
    """The first sentence of its documentation, without the reference, and what sets it apart."""
    first = (inspect.getdoc(type(solver)) or "").split("\n\n")[0].replace("\n", " ")
    first = re.sub(r" \([^()]*\b\d{4}\b[^()]*\)", "", first)  # the reference
    sentence = first.split(". ")[0].rstrip(".").replace("`", "")
    plain = type(solver)()
    settings = [
        f"{f.name}={getattr(solver, f.name)}"
        for f in dataclasses.fields(solver)  # type: ignore[arg-type]
        if getattr(solver, f.name) != getattr(plain, f.name)
    ]
    return sentence + (f"; {', '.join(settings)}" if settings else "")


def _recorded(solver: Solver) -> Program:
    model = parameterize(lambda x, sigma: x, "x0")
    return solver.program(schedules.karras(9), model)


def _draws(program: Program) -> int:
    middle = program.num_steps // 2
    return sum(step == middle for step, _ in program.noises)


def _number(order: int | None) -> str:
    return "" if order is None else str(order)


if __name__ == "__main__":
    main(sys.argv[1:])
