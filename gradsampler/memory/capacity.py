# SPDX-License-Identifier: Apache-2.0
"""How many bytes a device has left for this process."""

import os
from pathlib import Path

import torch

from gradsampler import _checks

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{prefix}i": 1024**k for k, prefix in enumerate("kmgt", 1)}


def free(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where the system does not tell.

    On an accelerator what torch has reserved and does not use counts as free. On the CPU it is
    what Linux calls available, or what the process's control group leaves where that is less.
    """
    if device.type == "cpu":
        available = _available()
        return None if available is None else max(0, min(available, *_groups()))
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    unused: int = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + unused


def parsed(argument: str, budget: int | str) -> int:
    """Bytes: an int, or a number with a unit such as "8GiB" (1024^3) or "500MB" (1000^2)."""
    if not isinstance(budget, str):
        return _checks.integer(argument, budget, 0)
    text = budget.strip().lower().removesuffix("b")
    number = text.rstrip("kmgti ")
    unit = _UNITS.get(text[len(number) :].strip())
    try:
        size = float(number) * (unit or 0)
    except ValueError:
        size, unit = 0.0, None
    if unit is None or not 0 <= size < 2**63:
        _checks.fail(argument, 'be bytes, such as 2**30, "8GiB" or "500MB"', repr(budget))
    return int(size)


def readable(size: float) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 99.95 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _available() -> int | None:
    """MemAvailable of the system; else the pages that are free, where these can be asked for."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _groups(
    listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What the limits of the process's control groups leave, version 2 and version 1."""
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        lines = []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = base / path.lstrip("/")
        # The limit of a group above holds too; in a container the path may lead outside of it.
        for each in (folder, *folder.parents):
            if each.is_relative_to(base):
                left += _left(each, limit, used, cache)
    return left or [2**63]


def _left(folder: Path, limit: str, used: str, cache: str) -> list[int]:
    """The limit less what is used, where file pages that can be dropped do not count."""
    try:
        most = int((folder / limit).read_text())  # "max" is no number
        taken = int((folder / used).read_text())
        statistics = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
        return [most - taken + int(statistics.get(cache, 0))]
    except (OSError, ValueError):
        return []
