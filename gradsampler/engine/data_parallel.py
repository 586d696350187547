# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: the run is its forward.

It averages gradients over the ranks when they reach the parameters, once a forward. So it prepares
for that before the run, is quiet in the model calls, and looks at the run's output, whose graph
leads to the parameters once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.algorithms.join import _JoinConfig
from torch.nn.parallel import DistributedDataParallel

from gradsampler import _checks
from gradsampler.engine.wrapper import Wrapper

# `no_sync` is not enough: under static_graph a call would still queue a reduction, in the backward
# of that call.
_QUIET = {
    "require_backward_grad_sync": False,
    "require_forward_param_sync": False,
    "find_unused_parameters": False,
    "_static_graph_delay_allreduce_enqueued": True,
    "_join_config": _JoinConfig.construct_disabled_join_config(),
}


class DataParallel(Wrapper):
    """A network that each rank has a copy of."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module: Any = module
        self._called = False

    @classmethod
    def among(cls, modules: Sequence[nn.Module]) -> list["DataParallel"]:
        """One for each such module."""
        found = [cls(x) for x in modules if isinstance(x, DistributedDataParallel)]
        for each in found:
            each.refuse()
        return found

    def refuse(self) -> None:
        """Raises for what is not served."""
        if getattr(self._module, "mixed_precision", None) is not None:
            _checks.fail(
                "denoiser: its DistributedDataParallel",
                "leave the precision to others",
                "one with mixed_precision",
                "take torch.autocast, or fully_shard with a MixedPrecisionPolicy",
            )

    def groups(self) -> list[Any]:
        return [self._module.process_group]

    def begin(self) -> None:
        self._called = False
        self._module._pre_forward()

    def finish(self, x: Tensor) -> Tensor:
        # One that was not called waits for no gradients, unless it looks itself which are missing.
        if not (self._called or self._module.find_unused_parameters):
            return x
        output: Tensor = self._module._post_forward(x)
        return output

    @contextmanager
    def call(self) -> Iterator[None]:
        module = self._module
        # Plain attributes; one is there under static_graph alone.
        before = {name: vars(module)[name] for name in _QUIET if name in vars(module)}
        handle = module.register_forward_pre_hook(self._note)
        try:
            for name in before:
                setattr(module, name, _QUIET[name])
            yield
        finally:
            handle.remove()
            for name, value in before.items():
                setattr(module, name, value)

    def _note(self, *_: object) -> None:
        self._called = True
