# SPDX-License-Identifier: Apache-2.0
"""Gradients that deliberately are not those of the run: parts are left out or rescaled."""

from collections.abc import Sequence

from gradsampler import _checks
from gradsampler.engine.policy import EXACT, Exact, Policy
from gradsampler.policies.calls import ChosenSteps, DetachedInput, NoJacobian, RandomSteps
from gradsampler.policies.last_steps import LastSteps
from gradsampler.policies.reach import applied
from gradsampler.policies.sizes import ClippedCotangent, ScaledCotangent
from gradsampler.policies.together import Together

__all__ = [
    "ChosenSteps",
    "ClippedCotangent",
    "DetachedInput",
    "Exact",
    "LastSteps",
    "NoJacobian",
    "Policy",
    "RandomSteps",
    "ScaledCotangent",
    "Together",
    "applied",
    "resolve",
]


def resolve(gradient: Policy | Sequence[Policy] | None) -> Policy:
    """The policy that ``gradient=`` names: None is the exact one, a list is `Together`."""
    if gradient is None:
        return EXACT
    if isinstance(gradient, Policy):
        return gradient
    if isinstance(gradient, str) or not isinstance(gradient, Sequence):
        expected = "be a policy of gradsampler.policies, a list of them, or None"
        _checks.fail_type("gradient", expected, gradient)
    return Together(gradient)
