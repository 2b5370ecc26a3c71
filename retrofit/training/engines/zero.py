"""DeepSpeed's ZeRO, stages 1 to 3: the optimizer's state sharded, then gradients, then weights too.

DeepSpeed's engine is driven here directly; everything that touches its private names is in this file, and the tests
restore each stage. It is given float32 trainables and computes in their dtype: its own bf16 mode, which would keep
bfloat16 copies of the weights and of the accumulated gradients, stays off, and autocast is the base class's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from retrofit.checkpoints.weights import materialise

from ..processes import Processes
from .base import MASTER, Engine, MakeOptimizer, ReadTensor


class ZeroEngine(Engine):
    """What the stages have in common.

    Args:
        config: a resolved DeepSpeed configuration.
    """

    def __init__(self, processes: Processes, config: Mapping[str, Any], *, bf16: bool, average: bool) -> None:
        super().__init__(processes, bf16=bf16, average=average)
        self.config = dict(config)
        stage = config["zero_optimization"]["stage"]
        self.name, self.survives_failed_backward = f"zero{stage}", stage == 1

    def prepare(self, model: nn.Module, read: ReadTensor, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.prepare`."""
        import deepspeed

        self._make_real(model, read)
        self._take_trainables(model, make_optimizer)
        self.model, zero, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        self.module, self.zero, self.deepspeed = model, zero, cast(Any, self.model)
        self.create_state()

    def _make_real(self, model: nn.Module, read: ReadTensor) -> None:
        materialise(model, read, on_leaf=lambda leaf: leaf.to(self.device))

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See `Engine.micro_batch`. DeepSpeed reduces in each, into shards from stage 2 on."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        with self.autocast():
            yield

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self, norm: float, max_norm: float | None) -> None:
        """See `Engine.step`. DeepSpeed clips by its own norm, which is this one to the last bits."""
        self.zero.clip_grad = max_norm or 0.0
        self.deepspeed.step()

    def read(self, kind: str, name: str) -> Tensor:
        """See `Engine.read`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._by_name[name]
        if kind == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)


class ZeroOneTwoEngine(ZeroEngine):
    """Stages 1 and 2: every rank has the weights, and a flat float32 part of the masters of each parameter group."""

    def create_state(self) -> None:
        """See `Engine.create_state`. The parameters are linked to their parts of the flat state."""
        super().create_state()
        self._link()

    def _link(self) -> None:
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def gradient_norm(self) -> float:
        """See `Engine.gradient_norm`."""
        return float(self.zero.scaled_global_norm() / self.zero.loss_scale)

    def discard(self) -> None:
        """See `Engine.discard`. As DeepSpeed does when it passes over a step: what is averaged already goes too."""
        self.zero.zero_grad()
        self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)
        self.zero.all_grad_tensors = dict.fromkeys(self.zero.all_grad_tensors)

    def masters(self) -> list[Tensor]:
        """See `Engine.masters`."""
        return list(self.zero.single_partition_of_fp32_groups)

    def masters_changed(self) -> None:
        """See `Engine.masters_changed`."""
        self.zero.update_lp_params()

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """See `Engine.write`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter, tensor = self._by_name[name], tensor.to(self.device)
        if kind == MASTER:
            safe_set_full_fp32_param(parameter, tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, kind)


class ZeroThreeEngine(ZeroEngine):
    """Stage 3: weights, too, are split evenly over the ranks and gathered module by module."""

    def _make_real(self, model: nn.Module, read: ReadTensor) -> None:
        """Module by module, so that no rank holds more than its parts and one module's weights."""
        import deepspeed

        def partition(leaf: nn.Module) -> None:
            deepspeed.zero.Init(module=leaf, config_dict_or_path=self.config, dtype=torch.float32)

        materialise(model, read, on_leaf=partition)

    def prepare(self, model: nn.Module, read: ReadTensor, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.prepare`."""
        super().prepare(model, read, make_optimizer)
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    hooks[key] = _unseen(hook)

    def autocast(self) -> torch.autocast:
        """See `Engine.autocast`. Autocast's copies of weights would be those of the whole model, kept for the step."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def discard(self) -> None:
        """See `Engine.discard`."""
        self.zero.zero_grad()

    def gradient_norm(self) -> float:
        """See `Engine.gradient_norm`."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return float(combine_grad_norm_groups(self.zero._get_norm_groups()) / self.zero.loss_scale)

    def masters(self) -> list[Tensor]:
        """See `Engine.masters`."""
        return list(self.zero.fp32_partitioned_groups_flat)

    def masters_changed(self) -> None:
        """See `Engine.masters_changed`."""
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """See `Engine.write`. Parts are of equal size, the last one padded with zeros."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter: Any = self._by_name[name]
        size = parameter.partition_numel()
        start = size * self.processes.rank
        part = torch.zeros(size, dtype=torch.float32)
        own = tensor.flatten()[start : start + size]
        part[: own.numel()] = own
        part = part.to(self.device)
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)


def _unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook whose gathering selective checkpointing does not take for a part of the block's arithmetic."""

    @wraps(hook)
    def run(*arguments: Any) -> Any:
        if not torch._C._len_torch_dispatch_stack():
            return hook(*arguments)
        with _disable_current_modes():
            return hook(*arguments)

    return run
