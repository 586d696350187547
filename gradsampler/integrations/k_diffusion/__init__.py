# SPDX-License-Identifier: Apache-2.0
"""Drop-in for k-diffusion: its sampling functions with gradients, its schedules and its denoisers.

import gradsampler.integrations.k_diffusion as K

denoiser = K.external.CompVisDenoiser(model)
sigmas = K.sampling.get_sigmas_karras(20, 0.03, 14.6)
x = K.sampling.sample_dpmpp_2m(denoiser, noise * sigmas[0], sigmas, extra_args={"cond": c})
"""

from gradsampler.integrations.k_diffusion import external, sampling
from gradsampler.integrations.k_diffusion.sampling import *  # noqa: F403

__all__ = ["external", "sampling", *sampling.__all__]
