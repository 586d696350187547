# SPDX-License-Identifier: Apache-2.0
"""What follows a run, a decoder and a loss: what it takes while the run's own memory is alive."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine import parts
from gradsampler.memory.planning.footprint import timed, undisturbed
from gradsampler.memory.planning.gauge import gauge

__all__ = ["After", "Following", "measured"]

After = Callable[[Tensor], Tensor]  # from a sample [B, *state] to a scalar loss


@dataclass(frozen=True)
class Following:
    """Bytes beside the sample, and seconds, of a loss and its backward."""

    peak: int = 0  # at most, the sample's cotangent included
    seconds: float = 0.0


def measured(after: After, x: Tensor) -> Following:
    """Calls ``after`` once, forward and backward, on values in the place of a sample.

    Random state, buffers of modules and ``.grad`` stay as they are.

    Args:
        after: from a sample to a scalar loss.
        x: [B, *state], of the sample's dtype.

    Raises:
        TypeError, ValueError: where it returns something else, or what does not depend on x.
    """
    seen = parts.reachable(after)
    buffers = [b for module in seen.modules for b in module._buffers.values() if b is not None]
    weights = [p for module in seen.modules for p in module._parameters.values() if p is not None]
    learned = {id(p): p for p in weights if p.requires_grad}.values()
    counter, start = gauge(x.device), x.detach().requires_grad_()
    with undisturbed(buffers, x.device, seen.generators), torch.enable_grad():
        with counter:
            torch.zeros((), device=x.device)  # torch imports now what a mode's first use needs
        with counter, timed(x.device) as seconds:
            loss = after(start)
        peak = counter.peak
        if not isinstance(loss, Tensor):
            _checks.fail_type("after: the value that it returns", "be a scalar tensor", loss)
        _checks.shape("after: the value that it returns", loss, ())
        if not loss.requires_grad:
            _checks.fail("after", "depend on the sample", "a value without gradient")
        with counter, timed(x.device) as backward:
            torch.autograd.grad(loss, [start, *learned], allow_unused=True)
    return Following(max(peak, counter.peak), sum(seconds) + sum(backward))
