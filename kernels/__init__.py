# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels, installed as ``gradsampler.kernels``.

The folder stands at the top of the repository, and a package called ``kernels`` exists on PyPI;
under that name this one refuses to load, so that neither can shadow the other unseen.
"""

if __name__ != "gradsampler.kernels":
    raise ImportError(
        f"this folder must be imported as gradsampler.kernels, got {__name__}; "
        "run python with -P or from another folder"
    )
