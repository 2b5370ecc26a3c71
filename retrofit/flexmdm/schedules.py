"""Insertion and unmasking schedules, and every numerical guard that they need.

A schedule is an increasing function of t in [0, 1] (alpha for insertion, beta for unmasking). All arithmetic is in
float64, whatever the dtype of t: 1 - alpha is small where it matters most. Losses and samplers divide by nothing and
clamp nothing; they take hazards and leap fractions from `Schedules`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

# A hazard beta'/(1-beta) of the linear and power schedules is infinite at t = 1. It is evaluated no nearer than this.
_LAST_TIME = 1.0 - 1e-6
# The network's prior for a gap is the logarithm of 1 - alpha: alpha comes no nearer to 1 than this.
_LAST_ALPHA = 1.0 - 1e-9


@dataclass(frozen=True)
class Schedule(ABC):
    """An increasing function of t; subclasses give `value`, `survival`, `derivative` and `inverse_survival`."""

    type: ClassVar[str]

    @abstractmethod
    def value(self, t: Tensor) -> Tensor:
        """The schedule at t, float64, same shape."""

    @abstractmethod
    def survival(self, t: Tensor) -> Tensor:
        """1 - value(t), float64, without cancellation."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """d value / d t, float64, same shape."""

    @abstractmethod
    def inverse_survival(self, s: Tensor) -> Tensor:
        """The earliest t with survival(t) <= s: 0 above the schedule's start, inf below its end."""

    def inverse(self, u: Tensor) -> Tensor:
        """The earliest t with value(t) >= u: 0 below the schedule's start, inf above its end."""
        return self.inverse_survival(1 - u.double())

    def hazard(self, t: Tensor) -> Tensor:
        """Rate of hitting at t of what has not been hit before: derivative / (1 - value), finite at t = 1."""
        t = t.double().clamp(max=_LAST_TIME)
        return self.derivative(t) / self.survival(t)

    def truncated_inverse(self, u: Tensor, start: Tensor) -> Tensor:
        """Quantile u of the hitting time given that it lies after `start` (inf if `start` is inf)."""
        begin = start.double().clamp(0, 1)
        hit = self.inverse_survival(self.survival(begin) * (1 - u.double()))
        # The inverse undoes the survival only to rounding: a token is never unmasked before it is inserted.
        return torch.where(start.isinf(), math.inf, torch.maximum(hit, begin))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for example {"type": "power", "exponent": 1.7}."""
        return {"type": self.type, **asdict(self)}


@dataclass(frozen=True)
class Linear(Schedule):
    """value(t) = t."""

    type: ClassVar[str] = "linear"

    def value(self, t: Tensor) -> Tensor:
        return t.double()

    def survival(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def inverse_survival(self, s: Tensor) -> Tensor:
        return 1 - s.double()


@dataclass(frozen=True)
class Power(Schedule):
    """value(t) = 1 - (1 - t)^exponent (arXiv 2607.26504 uses 1.7 for insertion and 2.89 for unmasking)."""

    exponent: float
    type: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.exponent) and self.exponent >= 1):
            raise ValueError(f"power schedule: exponent must be a number of at least 1, found {self.exponent}")

    def value(self, t: Tensor) -> Tensor:
        return 1 - self.survival(t)

    def survival(self, t: Tensor) -> Tensor:
        return (1 - t.double()) ** self.exponent

    def derivative(self, t: Tensor) -> Tensor:
        return self.exponent * (1 - t.double()) ** (self.exponent - 1)

    def hazard(self, t: Tensor) -> Tensor:
        # Of large exponents derivative and survival are both 0 long before the end.
        return self.exponent / (1 - t.double().clamp(max=_LAST_TIME))

    def inverse_survival(self, s: Tensor) -> Tensor:
        return 1 - s.double() ** (1 / self.exponent)


@dataclass(frozen=True)
class Geometric(Schedule):
    """value(t) = exp(-sigma_max^(1-t) sigma_min^t), the published code's insertion schedule.

    Its ends are kept as published: value(0) = exp(-sigma_max) (about 4.5e-5) is hit at t = 0, and the share
    1 - exp(-sigma_min) (about 1 %) above value(1) is never hit.
    """

    sigma_min: float = 0.01
    sigma_max: float = 10.0
    type: ClassVar[str] = "geometric"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "geometric schedule: 0 < sigma_min < sigma_max must hold, "
                f"found sigma_min {self.sigma_min} and sigma_max {self.sigma_max}"
            )

    def _sigma(self, t: Tensor) -> Tensor:
        t = t.double()
        return torch.exp((1 - t) * math.log(self.sigma_max) + t * math.log(self.sigma_min))

    def value(self, t: Tensor) -> Tensor:
        return torch.exp(-self._sigma(t))

    def survival(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._sigma(t))

    def derivative(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return math.log(self.sigma_max / self.sigma_min) * sigma * torch.exp(-sigma)

    def inverse_survival(self, s: Tensor) -> Tensor:
        sigma = -torch.log1p(-s.double())
        t = (math.log(self.sigma_max) - torch.log(sigma)) / math.log(self.sigma_max / self.sigma_min)
        return torch.where(t > 1, math.inf, t.clamp(min=0))


def schedule_from_dict(spec: dict[str, Any]) -> Schedule:
    """A schedule from its JSON form.

    Raises:
        ValueError: the type or a parameter is unknown, missing or out of range.
    """
    kinds: dict[str, type[Schedule]] = {kind.type: kind for kind in (Linear, Power, Geometric)}
    parameters = dict(spec) if isinstance(spec, dict) else {}
    kind = kinds.get(parameters.pop("type", ""))
    if kind is None:
        raise ValueError(f"schedule {spec!r}: `type` must be one of {', '.join(kinds)}")
    known = [field.name for field in fields(kind)]
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"schedule {kind.type}: unknown parameter `{name}` (known: {', '.join(known) or 'none'})")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"schedule {kind.type}: `{name}` must be a number, found {value!r}")
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ValueError(f"schedule {kind.type}: needs {', '.join(known)}") from error


@dataclass(frozen=True)
class Schedules:
    """The pair of schedules of a FlexMDM, and where insertion ends.

    `alpha_end` ends insertion only, in loss and sampler alike: tokens that would be inserted later stay deleted (a
    closing step of the sampler restores what the model still expects). Unmasking goes on to t = 1.
    """

    insertion: Schedule
    unmasking: Schedule
    alpha_end: float = 1 - 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.alpha_end <= 1:
            raise ValueError(f"alpha_end must lie in (0, 1], found {self.alpha_end}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for what is written beside samples and scores."""
        pair = {"insertion": self.insertion.to_dict(), "unmasking": self.unmasking.to_dict()}
        return {**pair, "alpha_end": self.alpha_end}

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is inserted by time t, float64: the insertion schedule up to `alpha_end`."""
        return self.insertion.value(t).clamp(max=min(self.alpha_end, _LAST_ALPHA))

    def insertion_hazard(self, t: Tensor) -> Tensor:
        """alpha' / (1 - alpha), float64; 0 once alpha has reached `alpha_end`."""
        return torch.where(self.insertion.value(t) < self.alpha_end, self.insertion.hazard(t), 0.0)

    def unmasking_hazard(self, t: Tensor) -> Tensor:
        """beta' / (1 - beta), float64, finite at t = 1."""
        return self.unmasking.hazard(t)

    def insertion_times(self, u1: Tensor) -> Tensor:
        """Insertion times of tokens from uniforms, float64: their distribution function is alpha. inf means never."""
        return torch.where(u1 < self.alpha_end, self.insertion.inverse(u1), math.inf)

    def hitting_times(self, u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
        """Insertion and unmasking times of tokens from two uniforms (section 2 of the mathematics).

        T1 has distribution function alpha; T2 given T1 has beta truncated to [T1, 1]. inf means never.

        Returns:
            (T1, T2), float64, of the shape of u1.
        """
        t1 = self.insertion_times(u1)
        return t1, self.unmasking.truncated_inverse(u2, t1)

    def insertion_fraction(self, t0: Tensor, t1: Tensor) -> Tensor:
        """Probability of insertion in (t0, t1] of a token not inserted by t0 (at t0 = 0: in [0, t1])."""
        start = torch.where(t0 > 0, self.alpha(t0), 0.0)
        return (self.alpha(t1) - start) / (1 - start)

    def unmasking_fraction(self, t0: Tensor, t1: Tensor) -> Tensor:
        """Probability of unmasking in (t0, t1] of a mask at t0; 1 if t1 is 1, where no mask may be left."""
        return torch.where(t1 >= 1, 1.0, 1 - self.unmasking.survival(t1) / self.unmasking.survival(t0))
