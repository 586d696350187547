# SPDX-License-Identifier: Apache-2.0
"""Runs on several devices. DDP and FSDP2 need nothing from here: runs recognise them."""

from gradsampler.distributed.replication import Replicated, replicated

__all__ = ["Replicated", "replicated"]
