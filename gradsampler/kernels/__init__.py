# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels.

In the repository their files lie at the top, in ``kernels/``; an installation has them beside this
one. That folder is no package: Python prefers any installed package called ``kernels`` to it, and
who looks for one finds none there.
"""

from pathlib import Path

if not Path(__file__).with_name("launch.py").exists():
    __path__.append(str(Path(__file__).parents[2] / "kernels"))
