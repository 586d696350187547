# SPDX-License-Identifier: Apache-2.0
"""How a state is made of the sample and of noise: ``x = alpha*x0 + sigma*e`` at the level sigma.

Methods in half the logarithm of the signal-to-noise ratio, ``lambda = ln(alpha / sigma)``, are the
same in all coordinates (Lu et al. 2022, arXiv 2206.00927, section 2).
"""

from abc import ABC, abstractmethod

from gradsampler.elementary import Coefficient, exp, log


class Coordinates(ABC):
    """The relation between a level, the factor of the sample and the half log-SNR."""

    @abstractmethod
    def alpha(self, sigma: Coefficient) -> Coefficient:
        """The factor of the sample in the state; 0 where the state is noise alone."""

    @abstractmethod
    def half_log_snr(self, sigma: Coefficient) -> Coefficient:
        """lambda = ln(alpha / sigma), for alpha and sigma above 0."""

    @abstractmethod
    def level(self, half_log_snr: Coefficient) -> Coefficient:
        """The level with that half log-SNR."""


class VE(Coordinates):
    """Variance-exploding coordinates, ``x = x0 + sigma*e``."""

    def alpha(self, sigma: Coefficient) -> Coefficient:
        return 1.0

    def half_log_snr(self, sigma: Coefficient) -> Coefficient:
        return -log(sigma)

    def level(self, half_log_snr: Coefficient) -> Coefficient:
        return exp(-half_log_snr)


class FlowTime(Coordinates):
    """Flow time, ``x = (1 - t)*x0 + t*e`` (Lipman et al. 2023, arXiv 2210.02747)."""

    def alpha(self, sigma: Coefficient) -> Coefficient:
        return 1 - sigma

    def half_log_snr(self, sigma: Coefficient) -> Coefficient:
        return log((1 - sigma) / sigma)

    def level(self, half_log_snr: Coefficient) -> Coefficient:
        return 1 / (1 + exp(half_log_snr))
