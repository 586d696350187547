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
    variants: dict[str, Callable[[], object]], rounds: int = 25, warmup: int = 3
) -> dict[str, Quantiles]:
    """Seconds a call of each variant; in every round in another order, so that none always finds
    the caches as the same other one left them.
    """
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            run = variants[name]
            times[name].append(_cuda(run) if torch.cuda.is_available() else _cpu(run))
    return {name: quantiles(values) for name, values in times.items()}


def _cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda(run: Callable[[], object]) -> float:
    """Device time by events, from a cold L2 cache."""
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host(run: Callable[[], object], calls: int = 200) -> float:
    """Seconds of host time a call, of many calls in a row without waiting for the device."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return spent / calls
