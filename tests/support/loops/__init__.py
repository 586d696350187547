# SPDX-License-Identifier: Apache-2.0
"""Sampling methods as plain loops over tensors, written from their papers.

They know nothing of programs and stages: ``loop(run, x, levels, **options)`` calls the denoiser
where the paper does, and takes noises in the order in which it injects them.
"""

from support.loops import correction, exponential, guided, slopes, stochastic
from support.loops.run import Run

__all__ = ["LOOPS", "Run"]

LOOPS = {
    **slopes.LOOPS,
    **exponential.LOOPS,
    **correction.LOOPS,
    **stochastic.LOOPS,
    **guided.LOOPS,
}
