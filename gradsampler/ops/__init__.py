# SPDX-License-Identifier: Apache-2.0
"""The ops that runs are made of, for those who write their own loop."""

from gradsampler.ops.functional import ancestral_step, flow_pair, reparameterize, step

__all__ = ["ancestral_step", "flow_pair", "reparameterize", "step"]
