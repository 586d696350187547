# SPDX-License-Identifier: Apache-2.0
"""Runs on several devices; DDP and FSDP2 need nothing of this, they are seen in a denoiser."""

from gradsampler.distributed.replication import Replicated, replicated

__all__ = ["Replicated", "replicated"]
