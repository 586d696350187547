# SPDX-License-Identifier: Apache-2.0
"""All that several processes share of a denoiser."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.engine.agreement import Agreement
from gradsampler.engine.wrapper import Wrapper


class Parallel:
    """All wrappers in a denoiser, which are asked in turn; without any nothing is done."""

    def __init__(self, wrappers: Sequence[Wrapper] = ()) -> None:
        self._wrappers = wrappers
        self.agreement = Agreement([group for each in wrappers for group in each.groups()])

    def __bool__(self) -> bool:
        return bool(self._wrappers)

    @classmethod
    def of(cls, modules: Callable[[], Sequence[nn.Module]]) -> "Parallel":
        """Those among the modules that a denoiser is made of.

        Args:
            modules: asked only where processes are connected.

        Raises:
            ValueError: for a wrapper that no run can serve, naming one that can be.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        # Loaded where there are processes alone.
        from gradsampler.engine.data_parallel import DataParallel
        from gradsampler.engine.fully_sharded import FullySharded
        from gradsampler.engine.tensor_parallel import TensorParallel

        found = modules()
        _refuse_unsummed(found)
        wrappers: list[Wrapper] = [
            *DataParallel.among(found),
            *FullySharded.among(found),
            *TensorParallel.among(found),
            *(each for each in found if isinstance(each, Wrapper)),
        ]
        return cls(wrappers)

    def run(self, run: Callable[[], Tensor]) -> Tensor:
        """The output of a run, which is the forward of each wrapper."""
        for each in self._wrappers:
            each.check()
        for each in self._wrappers:
            each.begin()
        x = run()
        for each in self._wrappers:
            x = each.finish(x)
        return x

    def call(self) -> AbstractContextManager[object]:
        """As `Wrapper.call`."""
        return _all([each.call() for each in self._wrappers])

    def backward(self) -> AbstractContextManager[object]:
        """As `Wrapper.backward`."""
        return _all([each.backward() for each in self._wrappers])

    def owner(self, leaf: Tensor) -> Tensor | None:
        """As `Wrapper.owner`."""
        owners = (each.owner(leaf) for each in self._wrappers)
        return next((owner for owner in owners if owner is not None), None)

    def catching(self, leaves: Sequence[Tensor]) -> AbstractContextManager[object]:
        """As `Wrapper.catching`."""
        return _all([each.catching(leaves) for each in self._wrappers])

    def reduced(self, owner: Tensor) -> Tensor | None:
        """As `Wrapper.reduced`."""
        gradients = (each.reduced(owner) for each in self._wrappers)
        return next((gradient for gradient in gradients if gradient is not None), None)


def _refuse_unsummed(modules: Sequence[nn.Module]) -> None:
    """Raises for diffusers' context parallelism, whose backward leaves shares, where none sums."""
    shared = [each for each in modules if isinstance(each, Wrapper)]
    # A pipeline's stand-in for a network shares its attributes, and calls it by the wrapper.
    within = {id(vars(x)) for each in shared for x in each.modules()}
    for module in modules:
        config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
        if config is not None and id(vars(module)) not in within:
            _checks.fail(
                "denoiser: a network with context parallelism",
                "have its gradients summed over the ranks",
                f"a bare {type(module).__name__}",
                "take gradsampler.distributed.replicated(network, group)",
            )


@contextmanager
def _entered(contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def _all(contexts: Sequence[AbstractContextManager[object]]) -> AbstractContextManager[object]:
    return _entered(contexts) if contexts else nullcontext()


def arrived(x: Tensor) -> Tensor:
    """``x``, where it is the result of a collective that is under way: when that is there."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is None or not isinstance(x, module.AsyncCollectiveTensor):
        return x
    return torch.clone(x)  # which waits, and keeps the graph
