# SPDX-License-Identifier: Apache-2.0
"""A pipeline's ``__call__`` taken apart at its loop over the timesteps.

Nearly all pipelines read ``head; for i, t in enumerate(timesteps): turn; tail``. To compute one
turn again in backward, or to solve for the state with a table, the turn has to be a function. It is
made from the source: the statements are the pipeline's own, and tracebacks show its lines.
"""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch

__all__ = ["Head", "Loop", "NoLoop", "own_call"]

Names = dict[str, Any]  # local variables of the function


class NoLoop(Exception):
    """Why a function cannot be taken apart."""


class Head(NamedTuple):
    """Where the loop begins."""

    items: list[Any]  # what the loop goes over
    names: Names


class _Early(NamedTuple):
    """The head returned; there is no loop to run."""

    value: Any


def own_call(pipe: Any) -> FunctionType:
    """The pipeline's ``__call__`` without the `torch.no_grad` around it."""
    call: Any = type(pipe).__call__
    decorated: Any = torch.no_grad()(lambda: None)
    while getattr(call, "__code__", None) is decorated.__code__:
        call = call.__wrapped__
    function: FunctionType = call
    return function


class Loop:
    """The parts of a function that loops over the timesteps of a scheduler.

    Args:
        function: a plain function whose source can be read.

    Raises:
        NoLoop: saying what is in the way.
    """

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        tree = _definition(function)
        self._file = inspect.getsourcefile(function) or "<pipeline>"
        before, self._loop, after = _split(tree)
        for node in _own(self._loop):
            if isinstance(node, _LEAVES):
                raise NoLoop(f"its loop contains {type(node).__name__.lower()}")
        if self._loop.orelse:
            raise NoLoop("its loop has an else branch")
        self._before, self._after, self._arguments = before, after, tree.args
        self.assigned = _names(self._loop, ast.Store)
        self.read_after = _needed(after)[0]
        self._built: dict[tuple[str, frozenset[str]], Callable[..., Any]] = {}

    def head(self, *args: Any, **kwargs: Any) -> Head:
        """Runs what comes before the loop."""
        items, names = self._head(*args, **kwargs)
        if isinstance(items, _Early):
            raise NoLoop("it returns before its loop")
        return Head(list(items), names)

    @functools.cached_property
    def _head(self) -> Callable[..., Any]:
        body = [_Returns().visit(copy.deepcopy(node)) for node in self._before]
        end = ast.Return(ast.Tuple([self._loop.iter, _LOCALS], ast.Load()))
        return self._compiled([*body, end], self._arguments)

    def turn(self, names: Names, item: Any) -> Names:
        """Runs one turn from the names bound before it; returns those bound after it."""
        once = ast.For(self._loop.target, ast.Name("__items__", ast.Load()), self._loop.body, [])
        ending = ast.Return(_LOCALS)
        part = self._part("turn", names, [ast.copy_location(once, self._loop), ending])
        after: Names = part(**names, __items__=[item])
        del after["__items__"]
        return after

    def tail(self, names: Names) -> Any:
        """Runs what comes after the loop and returns what the function returns."""
        return self._part("tail", names, self._after or [ast.Pass()])(**names, __items__=None)

    def _part(self, name: str, names: Names, body: Sequence[ast.stmt]) -> Callable[..., Any]:
        key = name, frozenset(names)
        if key not in self._built:
            arguments = [ast.arg(each) for each in ("__items__", *sorted(names))]
            signature = ast.arguments([], [], None, arguments, [None] * len(arguments), None, [])
            self._built[key] = self._compiled(body, signature)
        return self._built[key]

    def _compiled(self, body: Sequence[ast.stmt], arguments: ast.arguments) -> Callable[..., Any]:
        """A function of these statements that sees what the original sees."""
        free = dict(
            zip(self._function.__code__.co_freevars, self._function.__closure__ or (), strict=True)
        )
        part = ast.FunctionDef("__call__", _plain(arguments), list(body), [], None, None)
        outer = ast.parse("def __outer__(__early__): return __call__").body[0]
        assert isinstance(outer, ast.FunctionDef)
        outer.args.args += [ast.arg(name) for name in free]
        outer.body.insert(0, part)
        module = ast.fix_missing_locations(ast.Module([outer], []))
        space: dict[str, Any] = {}
        exec(compile(module, self._file, "exec"), self._function.__globals__, space)
        cells = {name: cell.cell_contents for name, cell in free.items()}
        built: Any = space["__outer__"](_Early, **cells)
        built.__defaults__ = self._function.__defaults__ if arguments is self._arguments else None
        if arguments is self._arguments:
            built.__kwdefaults__ = self._function.__kwdefaults__
        return cast(Callable[..., Any], built)


_LOCALS = ast.Call(ast.Name("locals", ast.Load()), [], [])
_LEAVES = ast.Return | ast.Break | ast.Yield | ast.YieldFrom | ast.Await


class _Returns(ast.NodeTransformer):
    """Marks the returns of a function's own body."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value or ast.Constant(None)
        early = ast.Call(ast.Name("__early__", ast.Load()), [value], [])
        return ast.copy_location(
            ast.Return(ast.Tuple([early, ast.Constant(None)], ast.Load())), node
        )

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        return node


def _definition(function: FunctionType) -> ast.FunctionDef:
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NoLoop(f"its source cannot be read ({error})") from error
    ast.increment_lineno(tree, first - 1)
    (definition,) = tree.body
    if not isinstance(definition, ast.FunctionDef):
        raise NoLoop(f"it is no plain function but {type(definition).__name__}")
    return definition


def _split(tree: ast.FunctionDef) -> tuple[list[ast.stmt], ast.For, list[ast.stmt]]:
    """The statements before the loop, the loop, and those after it."""
    found = [k for k, node in enumerate(tree.body) if _steps(node)]
    if len(found) != 1:
        what = "no statement steps" if not found else f"{len(found)} statements step"
        raise NoLoop(f"{what} its scheduler")
    (k,) = found
    before, node, after = tree.body[:k], tree.body[k], tree.body[k + 1 :]
    if isinstance(node, ast.With):
        before, node, after = _opened(before, node, after)
    if not isinstance(node, ast.For):
        raise NoLoop(f"its scheduler steps inside a {type(node).__name__.lower()}")
    if any(_steps(inner) for inner in ast.walk(node) if inner is not node and _repeats(inner)):
        raise NoLoop("its scheduler steps in a loop inside another loop")
    return before, node, after


def _opened(
    before: list[ast.stmt], node: ast.With, after: list[ast.stmt]
) -> tuple[list[ast.stmt], ast.stmt, list[ast.stmt]]:
    """Takes the loop out of ``with self.progress_bar(...) as bar``; the run closes the bar."""
    (item, *more), inner = node.items, node.body
    bar = item.context_expr
    named = isinstance(bar, ast.Call) and ast.unparse(bar.func) == "self.progress_bar"
    found = [k for k, each in enumerate(inner) if _steps(each)]
    if more or not named or len(found) != 1 or item.optional_vars is None:
        raise NoLoop(f"its loop is inside `with {ast.unparse(bar)}`")
    assign = ast.copy_location(ast.Assign([item.optional_vars], bar), node)
    (k,) = found
    return [*before, assign, *inner[:k]], inner[k], [*inner[k + 1 :], *after]


def _steps(node: ast.AST) -> bool:
    """Whether a scheduler's step is called somewhere in it."""
    return any(
        isinstance(each, ast.Call)
        and isinstance(each.func, ast.Attribute)
        and each.func.attr == "step"
        and "scheduler" in ast.unparse(each.func.value)
        for each in ast.walk(node)
    )


def _repeats(node: ast.AST) -> bool:
    return isinstance(node, ast.For | ast.While)


def _own(loop: ast.For) -> Iterator[ast.AST]:
    """The nodes of a loop without the breaks of the loops and the functions in it."""
    pending: list[ast.AST] = list(loop.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        inner = ast.iter_child_nodes(node)
        pending += [x for x in inner if not (_repeats(node) and isinstance(x, ast.Break))]


def _names(node: ast.AST, context: type) -> set[str]:
    return {
        each.id
        for each in ast.walk(node)
        if isinstance(each, ast.Name) and isinstance(each.ctx, context)
    }


def _needed(body: Sequence[ast.stmt]) -> tuple[set[str], set[str]]:
    """The names that statements read before they bind them, and those that they bind for sure."""
    needed, defined = set[str](), set[str]()
    for node in body:
        if isinstance(node, ast.If):
            needed |= _names(node.test, ast.Load) - defined
            branches = [_needed(node.body), _needed(node.orelse)]
            needed |= set[str]().union(*(reads for reads, _ in branches)) - defined
            defined |= branches[0][1] & branches[1][1]
        else:
            needed |= _names(node, ast.Load) - defined
            if isinstance(node, ast.Assign):
                defined |= _names(node, ast.Store)
    return needed, defined


def _plain(arguments: ast.arguments) -> ast.arguments:
    """The same arguments without annotations and defaults, which are set afterwards."""
    plain = copy.deepcopy(arguments)
    for each in _every(plain):
        each.annotation = None
    none = ast.Constant(None)
    plain.defaults = [none for _ in plain.defaults]
    plain.kw_defaults = [none if d is not None else None for d in plain.kw_defaults]
    return plain


def _every(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (each for each in (arguments.vararg, arguments.kwarg) if each is not None)
