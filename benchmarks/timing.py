# SPDX-License-Identifier: Apache-2.0
"""Times of variants of one thing, interleaved, so that noise meets all of them alike."""

import random
import statistics
import time
from collections.abc import Callable

import torch

Quantiles = tuple[float, float, float]  # median, 20 %, 80 %


def quantiles(values: list[float]) -> Quantiles:
    """The median and the 20 % and 80 % quantiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5)
    return statistics.median(values), fifths[0], fifths[3]


def interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int = 25,
    warmup: int = 3,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Quantiles]:
    """Seconds a call of each variant, by `wall` or another clock; in every round in another order,
    so that none always finds the caches as the same other one left them.
    """
    clock = clock or wall
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            times[name].append(clock(variants[name]))
    return {name: quantiles(values) for name, values in times.items()}


def wall(run: Callable[[], object]) -> float:
    """Seconds from the call until all that it asked of the device is done."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def device(run: Callable[[], object]) -> float:
    """Seconds of the device alone, from a cold L2 cache; `wall` where there is no GPU.

    The device sleeps while the host launches, so that it never waits for a launch: the host's time
    is a figure of its own. The sleep grows until the host was ahead.
    """
    if not torch.cuda.is_available():
        return wall(run)
    cycles = 2**20
    while cycles < 2**33:
        torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        ahead = not start.query()
        end.synchronize()
        if ahead:
            return start.elapsed_time(end) / 1e3
        cycles *= 2
    raise AssertionError("the host waits for the device: its time cannot be told apart")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host(run: Callable[[], object], calls: int = 200) -> float:
    """Seconds of host time a call, of many calls in a row without waiting for the device."""
    run()
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    _synchronize()
    return spent / calls
