# SPDX-License-Identifier: Apache-2.0
"""Several policies at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.cut import Cut
from gradsampler.engine.policy import Policy
from gradsampler.engine.program import Program, Slot


@dataclass(frozen=True)
class Together(Policy):
    """Several policies together: not the gradient of the run, unless all are exact.

    Args:
        policies: at least one; of `LastSteps` at most one. Cotangents pass them in this order.
    """

    policies: tuple[Policy, ...]

    def __init__(self, policies: Sequence[Policy]) -> None:
        for k, each in enumerate(policies):
            if not isinstance(each, Policy):
                _checks.fail_type(f"gradient[{k}]", "be a policy of gradsampler.policies", each)
        if not policies or sum(not each.whole for each in policies) > 1:
            expected = "hold a policy at least, and LastSteps once at most"
            _checks.fail("gradient", expected, list(policies))
        object.__setattr__(self, "policies", tuple(policies))

    @property
    def exact(self) -> bool:
        return all(each.exact for each in self.policies)

    @property
    def whole(self) -> bool:
        return all(each.whole for each in self.policies)

    @property
    def reshapes(self) -> bool:
        return any(each.reshapes for each in self.policies)

    def placed(self, num_steps: int) -> "Together":
        return Together([each.placed(num_steps) for each in self.policies])

    def cut(self, program: Program, given: Iterable[Slot]) -> Cut | None:
        cuts = (each.cut(program, given) for each in self.policies if not each.whole)
        return next(cuts, None)

    def pulls(self, step: int) -> bool:
        return all(each.pulls(step) for each in self.policies)

    def enters(self, step: int) -> bool:
        return all(each.enters(step) for each in self.policies)

    def passes(self, step: int, lam: Tensor) -> Tensor:
        for each in self.policies:
            lam = each.passes(step, lam)
        return lam
