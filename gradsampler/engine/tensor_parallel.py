# SPDX-License-Identifier: Apache-2.0
"""Networks whose parameters are DTensors: their ranks make the same calls.

DTensor's operations have collectives of their own, forward and back, in a call that is made again
as well; gradients of the parameters are DTensors, summed over the calls of a run as any others.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from gradsampler import _checks
from gradsampler.engine.wrapper import Wrapper


class TensorParallel(Wrapper):
    """The modules of a denoiser that lie on device meshes, by `parallelize_module` or otherwise."""

    def __init__(self, meshes: Sequence[Any]) -> None:
        self._meshes = meshes

    @classmethod
    def among(cls, modules: Sequence[nn.Module]) -> list["TensorParallel"]:
        """One for all of them together, if there are any."""
        meshes: dict[int, Any] = {}
        for module in modules:
            for p in module._parameters.values():
                if _checks.distributed(p):
                    mesh = cast(Any, p).device_mesh
                    meshes.setdefault(id(mesh), mesh)
        return [cls(list(meshes.values()))] if meshes else []

    def groups(self) -> list[Any]:
        return [group for mesh in self._meshes for group in mesh.get_all_groups()]
