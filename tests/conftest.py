# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen at import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
