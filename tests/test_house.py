# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, what is public, and what importing does."""

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import gradsampler as gs

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------ the rooms and the arrows

# A module, or all modules of a package as "name.*", and what it may import beside `_checks`. A new
# module outside those packages needs a line of its own. "*" stands for all but NOT_BY_STAR.
MAY_IMPORT = {
    "_checks": "",
    "_version": "",
    "replay": "",
    "generators": "",
    "philox": "",
    "schedules": "",
    "parameterization": "",
    "conditioning": "",
    "journal": "",
    "regularizers": "",
    "noise": "philox",
    "program": "parameterization",
    "solvers.*": "program parameterization solvers.*",
    "reference": "noise philox",
    "_native": "noise reference",
    "backends": "_native reference kernels.*",
    "_ops": "backends noise reference",
    "ops": "_ops backends noise philox",
    "flow": "ops philox",
    "observer": "program",
    "trajectory": "backends conditioning noise observer parameterization program",
    "adjoint": "generators noise program replay trajectory",
    "arguments": "trajectory program observer parameterization noise conditioning backends "
    "solvers.*",
    "memory.*": "_ops adjoint arguments noise parameterization program reference replay solvers.* "
    "trajectory memory.*",
    "sample": "*",
    "iteration": "*",
    "optimize": "arguments sample journal observer parameterization replay noise",
    "integrations.*": "* integrations.*",
    "gradient_flow": "*",
    "models.*": "models.*",
    "picture": "models",
    "chart": "memory.*",
    "demo": "* models.* picture optimize",
    "cli": "* chart demo gradient_flow models.*",
    "__main__": "cli",
    "kernels.*": "kernels.*",
}
NOT_BY_STAR = {"optimize", "journal", "demo", "cli", "chart", "picture", "models"}
NOT_BY_STAR |= {"gradient_flow", "integrations", "kernels", "_ops"}
NO_CHECKS = {"_checks", "_version", "replay", "generators", "models.*", "kernels.*", "__main__"}

# Torch is everywhere; what else is used where, and whether only inside functions.
THIRD_PARTY = {
    "memory.*": {"checkpoint_schedules"},
    "observer": {"tqdm"},
    "optimize": {"tqdm"},
    "models.*": {"safetensors"},
    "integrations.*": {"numpy", "tqdm"},
    "kernels.*": {"triton"},
}
THIRD_PARTY_IN_FUNCTIONS = {
    "picture": {"matplotlib"},
    "chart": {"matplotlib"},
    "backends": {"triton"},
}


class Import(NamedTuple):
    name: str  # dotted, in full
    in_function: bool


def sources():
    """Every module of the package by its name without ``gradsampler.``, and its file."""
    folders = {"": ROOT / "gradsampler", "kernels.": ROOT / "kernels"}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield (prefix + ".".join(parts)).rstrip("."), path


SOURCES = dict(sources())
MODULES = sorted(name for name in SOURCES if name)


@cache
def tree(name):
    return ast.parse(SOURCES[name].read_text())


def walk(node, in_function=False):
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.Lambda))
        yield child, inside
        yield from walk(child, inside)


@cache
def imports(name):
    """What a module imports. ``from package import module`` counts as that module."""
    found = []
    for node, inside in walk(tree(name)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                known = full.removeprefix("gradsampler.") in SOURCES
                found.append(Import(full if known else node.module, inside))
    return found


def family(name):
    """The key of a module in the tables."""
    return name if name in MAY_IMPORT else f"{name.split('.')[0]}.*"


def ours(name):
    """The modules of ours that a module imports."""
    return {
        each.name.removeprefix("gradsampler.")
        for each in imports(name)
        if each.name.startswith("gradsampler.")
    } | {"" for each in imports(name) if each.name == "gradsampler"}


def allowed(importer, imported):
    key = family(importer)
    if imported == "_checks":
        return key not in NO_CHECKS
    if imported == "_version":
        return key in ("demo", "cli")
    rules = MAY_IMPORT[key].split()
    top = imported.split(".")[0]
    if "*" in rules and top not in NOT_BY_STAR:
        return True
    # A package stands for its __init__, which re-exports its modules.
    return any(
        rule == imported or (rule.endswith(".*") and rule[:-2] == top) or rule == top == imported
        for rule in rules
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_its_room_may(name):
    assert family(name) in MAY_IMPORT, f"{name} is new: give it a line in the table"
    assert "" not in ours(name), "import modules, not the public package"
    wrong = sorted(each for each in ours(name) if not allowed(name, each))
    assert wrong == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_the_packages_that_it_may(name):
    key = family(name)
    anywhere = {"torch"} | THIRD_PARTY.get(key, set())
    inside = anywhere | THIRD_PARTY_IN_FUNCTIONS.get(key, set())
    for each in imports(name):
        top = each.name.split(".")[0]
        if top in sys.stdlib_module_names or top == "gradsampler":
            continue
        assert top in (inside if each.in_function else anywhere), each


@pytest.mark.parametrize("table", [MAY_IMPORT, THIRD_PARTY, THIRD_PARTY_IN_FUNCTIONS], ids=[
    "MAY_IMPORT", "THIRD_PARTY", "THIRD_PARTY_IN_FUNCTIONS"
])  # fmt: skip
def test_the_tables_name_no_module_that_is_gone(table):
    families = {family(name) for name in MODULES}
    assert set(table) <= families


def test_the_arrows_form_no_circle():
    """Imports inside functions included: who needs one to break a circle has one."""
    graph = {name: {each for each in ours(name) if each in SOURCES} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_rules_can_be_broken():
    """The test of the tests: arrows that must not be allowed."""
    for importer, imported in [
        ("noise", "sample"),
        ("solvers.euler", "trajectory"),
        ("sample", "optimize"),
        ("sample", "models.digits"),
        ("kernels.step", "noise"),
        ("kernels.step", "_checks"),
        ("models.digits", "_checks"),
        ("integrations.cosmos", "demo"),
        ("memory.store", "backends"),
        ("adjoint", "memory"),
        ("sample", "kernels.step"),
        ("cli", "optimize"),
    ]:
        assert not allowed(importer, imported), (importer, imported)
    for importer, imported in [
        ("noise", "philox"),
        ("solvers.euler", "solvers.base"),
        ("sample", "memory"),
        ("memory", "memory.store"),
        ("kernels.step", "kernels.launch"),
        ("demo", "optimize"),
    ]:
        assert allowed(importer, imported), (importer, imported)


@pytest.mark.parametrize("folder", ["gradsampler", "kernels", "tests", "examples", "benchmarks"])
def test_no_file_is_called_utils(folder):
    assert not list((ROOT / folder).rglob("util*.py"))
    assert not list((ROOT / folder).rglob("helper*.py"))


# ------------------------------------------------------------------ what is public

PUBLIC = [
    "EDM",
    "VP",
    "Churn",
    "Flow",
    "GradientWarning",
    "Guided",
    "NonFiniteError",
    "OptimizeResult",
    "OptimizeStep",
    "ReplayError",
    "StepInfo",
    "__version__",
    "backends",
    "memory",
    "noise",
    "ops",
    "optimize",
    "regularizers",
    "sample",
    "schedules",
    "solvers",
]


def test_the_public_surface_is_chosen():
    assert gs.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_explain_themselves(name):
    value = getattr(gs, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_nothing_else_looks_public():
    modules = {name.split(".")[0] for name in MODULES}
    extra = {name for name in vars(gs) if not name.startswith("_")} - set(PUBLIC) - modules
    assert extra == set()


@pytest.mark.parametrize("name", [m for m in MODULES if m != "__main__" and "kernels" not in m])
def test_what_a_module_lists_is_there(name):
    module = importlib.import_module(f"gradsampler.{name}")
    for each in getattr(module, "__all__", ()):
        assert hasattr(module, each), each


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_public_definition_has_a_docstring(name):
    bare = [] if ast.get_docstring(tree(name)) else ["the module"]
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            bare += [] if ast.get_docstring(node) else [node.name]
    assert bare == []


@pytest.mark.parametrize("name", [m for m in sorted(SOURCES) if m != "__main__"])
def test_the_examples_in_docstrings_run(name):
    if name.startswith("kernels"):
        pytest.importorskip("triton")
    module = importlib.import_module(f"gradsampler.{name}".rstrip("."))
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner()
    for test in finder.find(module, module.__name__):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_the_calls_that_users_type_have_an_example():
    for call in (gs.sample, gs.optimize, gs.ops.step, gs.EDM, gs.schedules.karras):
        assert ">>>" in inspect.getdoc(call)


# ------------------------------------------------------------------ what importing does


def python(code, *options, cwd=None):
    """Runs code in an interpreter of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-P", *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


def test_importing_prints_nothing_and_loads_nothing_heavy():
    heavy = ["matplotlib", "sklearn", "scipy", "triton", "PIL", "gradsampler.kernels"]
    heavy += ["gradsampler._native", "gradsampler._C"]
    child = python(
        "import sys, torch; before = set(sys.modules); state = torch.get_rng_state()\n"
        "import gradsampler, gradsampler.cli\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        f"loaded = [m for m in {heavy} if m in set(sys.modules) - before]\n"
        "assert not loaded, loaded",
        "-W",
        "error",
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_the_kernels_load_under_their_own_name():
    pytest.importorskip("triton")
    module = importlib.import_module("gradsampler.kernels")
    assert Path(module.__file__).samefile(ROOT / "kernels" / "__init__.py")


@pytest.mark.parametrize("name", ["kernels", "other.kernels"])
def test_the_kernels_refuse_another_name(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match=rf"gradsampler\.kernels, got {name}; .*-P"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_kernels_refuse_to_be_imported_from_the_repository():
    child = python("import sys; sys.path.insert(0, ''); import kernels", cwd=ROOT)
    assert child.returncode == 1
    assert "ImportError: this folder must be imported as gradsampler.kernels" in child.stderr


# ------------------------------------------------------------------ the package


@cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version_is_told_everywhere():
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "gradsampler._version.__version__"
    }
    assert importlib.metadata.version("gradsampler") == gs.__version__
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [h for h in headings if h.strip("[]").lower() != "unreleased"]
    assert re.match(r"\[?([\w.]+)\]?", released[0])[1] == gs.__version__


def test_every_package_is_installed():
    packages = {f"gradsampler.{n}".rstrip(".") for n, p in SOURCES.items() if p.stem == "__init__"}
    assert set(project()["tool"]["setuptools"]["packages"]) == packages


def test_what_lies_beside_the_modules_is_installed():
    data = project()["tool"]["setuptools"]["package-data"]
    for folder in {path.parent for path in SOURCES.values()}:
        package = ".".join(folder.relative_to(ROOT).parts)
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc", ".so"):
                patterns = data.get(package, ())
                assert any(path.match(pattern) for pattern in patterns), path


def test_third_party_packages_are_declared():
    declared = {
        re.match(r"[\w-]+", d)[0].replace("-", "_") for d in project()["project"]["dependencies"]
    }
    used = {each.name.split(".")[0] for name in SOURCES for each in imports(name)}
    used -= {*sys.stdlib_module_names, "gradsampler", "triton"}
    assert used <= declared
