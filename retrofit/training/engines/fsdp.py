"""Fully sharded data parallel, torch's second (`fully_shard`): every tensor is split over the ranks by its first axis.

Units: each block, the LM head, each new module; embedding and final norm stay with the root. Blocks and head are
gathered in bfloat16 where the recipe computes in it, root and new modules as they are stored: the arithmetic is the
autocast of one process, but for the blocks' norms, whose gains are bfloat16 too. Gradients are reduced, in float32,
after every micro-batch: a rank never holds a whole gradient.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from retrofit.flexmdm.modeling import NEW_MODULES

from ..optimizer import total_norm
from .base import Engine, MakeOptimizer, ReadTensor


class FullyShardedEngine(Engine):
    """See the module."""

    name = "fsdp2"
    survives_failed_backward = False

    def prepare(self, model: nn.Module, read: ReadTensor, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.prepare`. Each rank reads every tensor and keeps its own rows."""
        plugin = self.processes.accelerator.state.fsdp_plugin
        self._shard(model, reshard_after_forward=bool(plugin.reshard_after_forward))
        model.to_empty(device=self.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _set(cast(DTensor, parameter), read(name))
        # Of the time modulations, which are views that nothing changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.module = self.model = model
        self._take_trainables(model, make_optimizer)
        self.create_state()

    def _shard(self, model: Any, *, reshard_after_forward: bool) -> None:
        whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        computed = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        in_bf16, as_stored, root = sharded_units(model)
        for unit in (*in_bf16, *as_stored):
            _agree_on_dtype(unit)
            policy = computed if unit in in_bf16 else whole
            fully_shard(unit, mesh=self._mesh(), mp_policy=policy, reshard_after_forward=reshard_after_forward)
        _agree_on_dtype(root)
        # A tied head reads the embedding's weight after the backbone's forward: the root stays gathered in between.
        fully_shard(model, mesh=self._mesh(), mp_policy=whole, reshard_after_forward=False)

    def _mesh(self) -> DeviceMesh:
        if not hasattr(self, "mesh"):
            sizes = self.processes.accelerator.parallelism_config
            replicas = sizes.dp_replicate_size if sizes is not None else 1
            shape: tuple[int, ...] = (self.processes.world_size,)
            names: tuple[str, ...] = ("shard",)
            if replicas > 1:
                shape, names = (replicas, self.processes.world_size // replicas), ("replicate", "shard")
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self.mesh

    def gradient_norm(self) -> float:
        """See `Engine.gradient_norm`."""
        return float(cast(DTensor, total_norm(self.parameters)).full_tensor())

    def masters_changed(self) -> None:
        """See `Engine.masters_changed`. The root stays gathered after a forward without a backward: let go of it."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def read(self, kind: str, name: str) -> Tensor:
        """See `Engine.read`."""
        return cast(DTensor, self._state(kind, name)).full_tensor()

    @torch.no_grad()
    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """See `Engine.write`."""
        _set(cast(DTensor, self._state(kind, name)), tensor)


def sharded_units(model: Any) -> tuple[list[nn.Module], list[nn.Module], nn.Module]:
    """Units that are computed in bfloat16 where the recipe says so; other units; what stays with the root."""
    transformer = model.model.transformer
    in_bf16 = [*transformer["blocks"], *([transformer["ff_out"]] if "ff_out" in transformer else [])]
    as_stored = [getattr(model, name) for name in NEW_MODULES if hasattr(model, name)]
    return in_bf16, as_stored, nn.ModuleList([transformer["wte"], transformer["ln_f"]])


def _agree_on_dtype(unit: nn.Module) -> None:
    """A unit has one dtype: frozen bfloat16 weights beside float32 factors are stored in float32, as exact."""
    if len({parameter.dtype for parameter in unit.parameters()}) > 1:
        unit.float()


def _set(target: DTensor, full: Tensor) -> None:
    """Copies this rank's part of a full CPU tensor that every rank has."""
    full = full.to(target.device, target.dtype)
    part = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(part.to_local())
