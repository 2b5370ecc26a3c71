"""Exponential moving average of the trainable weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .optimizer import NamedParameters, check_names


class Average:
    """average <- decay * average + (1 - decay) * weight after every step, from the starting weights on.

    LoRA factors are averaged each for itself, as is usual; the average of products is not the product of averages.
    """

    def __init__(self, parameters: NamedParameters, decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = [parameter.detach().clone() for _, parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.values, [parameter for _, parameter in self.parameters], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model's weights are the average."""
        kept = [parameter.detach().clone() for _, parameter in self.parameters]
        self._set(self.values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for (_, parameter), value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def export_state(self) -> dict[str, Tensor]:
        """`ema/<name>` -> float32 on the CPU."""
        return {
            f"ema/{name}": value.to("cpu", torch.float32, copy=True)
            for (name, _), value in zip(self.parameters, self.values, strict=True)
        }

    @torch.no_grad()
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `export_state` gave (ValueError if names or shapes differ)."""
        check_names(self.parameters, tensors, ("ema",))
        for (name, _), value in zip(self.parameters, self.values, strict=True):
            value.copy_(tensors[f"ema/{name}"])
