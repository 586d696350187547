# SPDX-License-Identifier: Apache-2.0
"""FSDP2, `torch.distributed.fsdp.fully_shard`: weights in shards, gathered for each model call.

The leaves of a call's graph are the gathered parameters, which come and go; those that a user
trains are the shards. So the gradients of the gathered ones are summed over the calls of a run, in
the place where FSDP looks for them, and FSDP reduces the sum once, at the end of the run's
backward. What it leaves in the shards' ``.grad`` is what the run returns for them, and autograd
goes on with it: hooks run once, and gradients of several runs add up. Dtypes and factors of the
reduction stay FSDP's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from gradsampler import _checks
from gradsampler.engine.wrapper import Wrapper


class FullySharded(Wrapper):
    """All modules of a denoiser whose parameters are shards."""

    def __init__(self, modules: Sequence[FSDPModule]) -> None:
        self._modules = modules
        self._known: dict[int, Any] = {}  # of gathered parameters, by id
        self._gradients: dict[int, Tensor] = {}  # of shards, by id

    @classmethod
    def among(cls, modules: Sequence[nn.Module]) -> list["FullySharded"]:
        """One for all of them together, if there are any."""
        for module in modules:
            _refuse(module)
        found = [module for module in modules if isinstance(module, FSDPModule)]
        return [cls(found)] if found else []

    def groups(self) -> list[Any]:
        found = []
        for _, group in self._groups():
            for name in ("shard_process_group", "replicate_process_group"):
                found.append(getattr(group.mesh_info, name, None))
        return [group for group in found if group is not None]

    def check(self) -> None:
        for state in self._states():
            if state._state_ctx.iter_forward_root is not None:
                _checks.fail(
                    "denoiser",
                    "be called outside of the forward of a module with fully_shard",
                    "a run within it",
                    "call fully_shard on the network that the run calls, and not on what calls "
                    "the run",
                )

    @contextmanager
    def call(self) -> Iterator[None]:
        # FSDP takes a forward within a backward for an activation checkpoint's, and leaves the
        # parameters gathered. This one belongs to a run: afterwards it is as after any forward.
        if torch._C._current_graph_task_id() == -1:
            yield
            return
        with ExitStack() as stack:
            for module in self._modules:
                handle = module.register_forward_hook(_reshard)  # type: ignore[attr-defined]
                stack.callback(handle.remove)
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        self._gradients.clear()
        states = self._states()
        with ExitStack() as stack:
            for state in states:
                stack.enter_context(_idle(state))
            params = [p for _, group in self._groups() for p in group.fsdp_params]
            aside = [_Aside(p) for p in params]
            try:
                with self._unreduced():
                    yield
            except BaseException:
                for _, group in self._groups():
                    _reset(group)
                for each in aside:
                    each.forget()
                raise
            else:
                for each in aside:
                    each.join()
                for root in {id(state._state_ctx): state for state in states}.values():
                    root._root_post_backward_final_callback()
                for p in params:
                    if p.sharded_param.grad is not None:
                        self._gradients[id(p.sharded_param)] = p.sharded_param.grad
            finally:
                for each in aside:
                    each.restore()

    def owner(self, leaf: Tensor) -> Tensor | None:
        found = self._param(leaf)
        owner: Tensor | None = None if found is None else found.sharded_param
        return owner

    @contextmanager
    def catching(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for leaf in leaves:
                if self._param(leaf) is not None:
                    stack.callback(leaf.register_hook(_Sum(leaf)).remove)
            yield

    def reduced(self, owner: Tensor) -> Tensor | None:
        return self._gradients.pop(id(owner), None)

    def _param(self, leaf: Tensor) -> Any:
        found = self._known.get(id(leaf))
        if found is None:
            params = [p for _, group in self._groups() for p in group.fsdp_params]
            self._known = {id(p._unsharded_param): p for p in params if _gathered(p)}
            found = self._known.get(id(leaf))
        return found

    def _states(self) -> list[Any]:
        """The states of the modules, and of those that they share a root with."""
        found: dict[int, Any] = {}
        for module in self._modules:
            state = module._get_fsdp_state()
            for each in (*state._state_ctx.all_states, state):
                found.setdefault(id(each), each)
        return list(found.values())

    def _groups(self) -> list[tuple[Any, Any]]:
        return [(state, group) for state in self._states() for group in _groups(state)]

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        """Leaves the gradients of a backward as they are, to be added up."""
        # One that no call of the run has gathered has no gradients, and FSDP would look at them.
        groups = [group for _, group in self._groups() if all(map(_gathered, group.fsdp_params))]
        before = [(group, group.reduce_grads) for group in groups]
        try:
            for group, _ in before:
                group.reduce_grads = False
            yield
        finally:
            for group, reduce_grads in before:
                group.reduce_grads = reduce_grads


def check_summed(module: nn.Module, ranks: int) -> None:
    """Raises where FSDP2 does not sum shares of gradients over the ``ranks`` that have them.

    It averages over all ranks that have shards; of those that compute one sample together it is to
    be the sum.
    """
    for each in module.modules():
        if not isinstance(each, FSDPModule):
            continue
        for group in _groups(each._get_fsdp_state()):
            if not any(p.sharded_param.requires_grad for p in group.fsdp_params):
                continue
            factor = group.mesh_info.mesh.size() / ranks
            if group.gradient_divide_factor != factor:
                _checks.fail(
                    "replicated: the weights within, by fully_shard,",
                    "have their gradients summed over the ranks of a sample",
                    "an average",
                    f"call set_gradient_divide_factor({factor}) on each module with fully_shard",
                )


class _Sum:
    """Adds to the ``.grad`` of a gathered parameter, in time for FSDP's own hooks."""

    def __init__(self, leaf: Tensor) -> None:
        self._leaf = leaf

    def __call__(self, g: Tensor) -> Tensor:
        leaf = self._leaf
        # Never in place: others may hold the same tensor.
        leaf.grad = _laid_out(g, leaf) if leaf.grad is None else leaf.grad + g
        return g.new_zeros(()).expand_as(g)  # the caller of autograd gets it, and needs no copy


class _Aside:
    """What a parameter holds of other runs, put aside for the time of one."""

    def __init__(self, param: Any) -> None:
        self._param = param
        self._sharded = param.sharded_param.grad
        self._sum = param._unsharded_param.grad if _gathered(param) else None
        self._wide = param.unsharded_accumulated_grad
        param.sharded_param.grad = None
        if self._sum is not None:
            param._unsharded_param.grad = None
        param.unsharded_accumulated_grad = None
        self._hooks = param.sharded_param._post_accumulate_grad_hooks
        if self._hooks:
            param.sharded_param._post_accumulate_grad_hooks = None

    def join(self) -> None:
        """Adds the gathered gradients of earlier runs that were not reduced to those of this."""
        param = self._param
        if self._sum is not None:
            now = param._unsharded_param.grad
            param._unsharded_param.grad = self._sum if now is None else self._sum + now
        if self._wide is not None:
            now = param.unsharded_accumulated_grad
            param.unsharded_accumulated_grad = self._wide if now is None else self._wide + now

    def forget(self) -> None:
        """Drops the gradients of this run."""
        if _gathered(self._param):
            self._param._unsharded_param.grad = self._sum
        self._param.unsharded_accumulated_grad = self._wide

    def restore(self) -> None:
        """Puts back what belongs to the shard."""
        self._param.sharded_param.grad = self._sharded
        if self._hooks:
            self._param.sharded_param._post_accumulate_grad_hooks = self._hooks


@contextmanager
def _idle(state: Any) -> Iterator[None]:
    """Has a state begin and end as between two backwards, though it may be within one.

    The same module may be used directly in a loss. Its own backward then has gathered it, and goes
    on with it afterwards.
    """
    context, groups = state._state_ctx, _groups(state)
    queued, root = context.post_backward_final_callback_queued, context.iter_forward_root
    before = state._training_state
    was = [(group, group._training_state, group.is_unsharded) for group in groups]
    _rest(state)
    try:
        yield
    finally:
        _rest(state)
        state._training_state = before
        context.post_backward_final_callback_queued, context.iter_forward_root = queued, root
        for group, training_state, gathered in was:
            group._training_state = training_state
            if training_state == TrainingState.PRE_BACKWARD and gathered:
                group.unshard()
                group.wait_for_unshard()


def _rest(state: Any) -> None:
    state._training_state = TrainingState.IDLE
    state._state_ctx.post_backward_final_callback_queued = False
    state._state_ctx.iter_forward_root = None
    for group in _groups(state):
        group._training_state = TrainingState.IDLE


def _reset(group: Any) -> None:
    """Lets go of what a failed backward has under way."""
    partial = group._partial_reduce_output
    getattr(group, "_reset_iter_state", group._to_sharded)()
    group._partial_reduce_output = partial  # of earlier runs


def _reshard(module: Any, args: Any, output: Any) -> None:
    """Ends a forward within a backward as FSDP ends one outside."""
    state = module._get_fsdp_state()
    if state._training_state == TrainingState.PRE_BACKWARD or state._modules_to_run_forward:
        return
    for group in _groups(state):
        with group.use_training_state(TrainingState.FORWARD):
            group.reshard()
        group._record_post_forward()


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def _gathered(param: Any) -> bool:
    return hasattr(param, "_unsharded_param")


def _laid_out(g: Tensor, like: Tensor) -> Tensor:
    """``g`` with the strides of a parameter, as autograd keeps gradients."""
    return g if g.stride() == like.stride() else torch.empty_like(like).copy_(g)


def _refuse(module: nn.Module) -> None:
    """Raises for wrappers that a run cannot serve."""
    if isinstance(module, FullyShardedDataParallel):
        got, hint = "a FullyShardedDataParallel (FSDP1)", "call fully_shard on its blocks and on it"
    elif any(
        kind.__module__.startswith("torch.distributed._composable.replicate")
        for kind in type(module).__mro__
    ):
        got = "a module with replicate"
        hint = "wrap it in DistributedDataParallel, or call fully_shard with a mesh of two axes"
    else:
        return
    _checks.fail("denoiser", "be shared by DistributedDataParallel or fully_shard", got, hint)
