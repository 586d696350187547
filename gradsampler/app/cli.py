# SPDX-License-Identifier: Apache-2.0
"""The command line: ``gradsampler optimize``, ``check``, ``plan`` and ``doctor``."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsampler import _checks, gradient_flow, models, noise, schedules, solvers
from gradsampler import memory as memories
from gradsampler._version import __version__
from gradsampler.app import chart
from gradsampler.app.demo import OBJECTIVES, Demo
from gradsampler.engine.observer import NonFiniteError
from gradsampler.memory.capacity import readable
from gradsampler.memory.planning.gauge import gauge
from gradsampler.ops import backends
from gradsampler.parameterization import EDM, Parameterization, parameterize
from gradsampler.sampling import sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        print(f"gradsampler {arguments.command}: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"gradsampler {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradsampler", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter

    check = commands.add_parser(
        "check",
        help="does the gradient arrive at z0, and is it the right one?",
        formatter_class=defaults,
    )
    check.add_argument("--denoiser", help="package.module:callable, instead of 0.7 x + 0.1")
    check.add_argument("--shape", default="1,2,2,8,8", help="shape of z0: batch, then state")
    check.add_argument("--steps", type=int, default=4, help="sampler steps")
    check.add_argument(
        "--directions", type=int, default=1, help="random directions to compare derivatives along"
    )
    check.add_argument(
        "--also",
        action="append",
        default=[],
        choices=["parameters"],
        help="whose derivatives to compare beside those of the state",
    )
    check.set_defaults(run=_check)

    doctor = commands.add_parser("doctor", help="which backends are here, and why not the others?")
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser(
        "plan", help="what will each memory strategy take?", formatter_class=defaults
    )
    plan.add_argument("--denoiser", help="package.module:callable, instead of the digits model")
    plan.add_argument("--shape", default="16,1,8,8", help="shape of z0: batch, then state")
    plan.add_argument("--solver", default="euler", help=", ".join(solvers.names()))
    plan.add_argument("--steps", type=int, default=35, help="sampler steps")
    plan.add_argument("--budget", help='such as "8GiB" or "500MB", instead of what is free')
    plan.add_argument("--plot", type=Path, help="PNG of the memory against the time")
    plan.add_argument("--measure", action="store_true", help="run each strategy that fits, once")
    plan.set_defaults(run=_plan)

    optimize = commands.add_parser(
        "optimize", help="optimise noise on the digits model", formatter_class=defaults
    )
    optimize.add_argument("--objective", choices=sorted(OBJECTIVES), default="digit")
    optimize.add_argument("--digit", type=int, default=7, help="what to be read as")
    optimize.add_argument("--image", type=Path, help="picture to match")
    optimize.add_argument("--starts", type=int, default=16)
    optimize.add_argument("--iterations", type=int, default=50, help="updates of the noise")
    optimize.add_argument("--lr", type=float, default=0.1)
    optimize.add_argument("--solver", default="res_2ab", help=", ".join(solvers.names()))
    optimize.add_argument("--steps", type=int, default=35, help="sampler steps")
    optimize.add_argument("--noise", default="signed_roll", help=", ".join(noise.names()))
    optimize.add_argument("--memory", default="checkpoint", help=", ".join(memories.names()))
    optimize.add_argument("--seed", type=int, default=0)
    optimize.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results")
    optimize.set_defaults(run=_optimize)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    """Both modes in turn; with LEARNABLE_STEP_NOISE=1 the second alone."""
    learnable = os.environ.get("LEARNABLE_STEP_NOISE") == "1"
    sources: dict[str, noise.NoiseSource] = {"learnable step noise": noise.SinCos()}
    if not learnable:
        sources = {"no step noise": noise.Off(), **sources}
    denoiser = gradient_flow.affine_denoiser
    if arguments.denoiser is not None:
        denoiser = _imported(arguments.denoiser)
    shape = _shape(arguments.shape)
    levels = schedules.karras(_checks.integer("--steps", arguments.steps, 1))
    passed = True
    for mode, source in sources.items():
        z0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        report = gradient_flow.check(
            denoiser,
            z0,
            levels,
            solver="res_2ab",
            noise=source,
            churn=solvers.Churn(0.2 * arguments.steps),
            memory="checkpoint",
            directions=arguments.directions,
            also=arguments.also,
        )
        print(f"{mode}\n{report}")
        passed = passed and report.passed
    return 0 if passed else 1


def _doctor(arguments: argparse.Namespace) -> int:
    """Versions, backends and the facts of the native extension's build."""
    from gradsampler.ops import native

    print(f"gradsampler {__version__}, torch {torch.__version__}")
    print(f"CUDA of this torch: {torch.version.cuda or 'none'}")
    print("backends:")
    for name, found in backends.available().items():
        print(f"  {name:10} {'here  ' if backends.present(name) else 'absent'}  {found}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for kind in devices:
        print(f"used on {kind} tensors: {backends.choose(None, torch.device(kind)).name}")
    print("native extension:")
    reason = native.available()
    if reason is not None:
        print(f"  absent: {reason}")
        return 0
    for fact, value in (native.facts() | {"isas": ", ".join(native.isas())}).items():
        print(f"  {fact:12} {value or 'none'}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    """Prints the table, draws it, and holds it against runs."""
    if arguments.denoiser is None:
        network = models.load_network()
        model: Parameterization = EDM(network, sigma_data=network.sigma_data)
    else:
        model = parameterize(_imported(arguments.denoiser), "x0")
    weight = next((p for module in model.modules() for p in module.parameters()), torch.empty(0))
    z0 = torch.randn(_shape(arguments.shape), generator=torch.Generator().manual_seed(0))
    z0 = z0.to(weight.device).requires_grad_()
    levels = schedules.karras(_checks.integer("--steps", arguments.steps, 1))
    # The first call of all pays for what only a first call does: two of them, one counts.
    memories.plan(model, z0, levels, solver=arguments.solver, budget=0)
    plan = memories.plan(model, z0, levels, solver=arguments.solver, budget=arguments.budget)
    print(plan)
    if arguments.plot is not None:
        chart.memory_against_time(arguments.plot, plan)
        print(f"wrote {arguments.plot}")
    if arguments.measure:
        for row in plan:
            if row.fits:
                print(_measured(row, model, z0, levels, arguments.solver))
    return 0 if any(row.fits for row in plan) else 1


def _measured(
    row: memories.Row, model: Parameterization, z0: Tensor, levels: Tensor, solver: str
) -> str:
    """Runs one strategy; a line with what was predicted of it."""
    counter, begin = gauge(z0.device), time.perf_counter()
    with counter:
        x = sample(model, z0, levels, solver=solver, memory=row.memory, progress=True)
        torch.autograd.grad(x.square().mean(), z0)[0].sum().item()
    seconds = time.perf_counter() - begin
    peaks = f"peak {readable(counter.peak)}, predicted {readable(row.peak)}"
    return f"{row.name}: {peaks}; {seconds:.2g} s, predicted {row.seconds:.2g} s"


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() for size in sizes):
        _checks.fail("--shape", "be integers separated by commas", repr(text))
    return tuple(int(size) for size in sizes)


def _imported(name: str) -> Any:
    """The object that ``package.module:callable`` names, the current folder included."""
    module, separator, attribute = name.partition(":")
    if not separator:
        _checks.fail("--denoiser", "have the form package.module:callable", repr(name))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), attribute)


def _optimize(arguments: argparse.Namespace) -> int:
    source = noise.resolve(_checks.choice("--noise", arguments.noise, noise.names()))
    demo = Demo(
        objective=arguments.objective,
        digit=arguments.digit,
        image=arguments.image,
        starts=arguments.starts,
        iterations=arguments.iterations,
        lr=arguments.lr,
        solver=arguments.solver,
        steps=arguments.steps,
        noise=source,
        memory=arguments.memory,
        seed=arguments.seed,
    )
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        print(demo.run(arguments.out))
        return 0
    dist.init_process_group("gloo")
    if report := demo.run(arguments.out, group=dist.group.WORLD):
        print(report)
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()
    return 0
