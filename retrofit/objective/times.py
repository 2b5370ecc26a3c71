"""The density of t: where the draws of t go, and the weights that leave the loss what it is (docs/mathematics.md).

The loss is a mean over t uniform on (0, 1). Drawing t from a density q instead and dividing each loss by q(t) leaves
that mean as it is, whatever q. The variance changes: it is least where q is proportional to the root mean square of
what is averaged, the gradient at t.

A density here is a histogram, whose heights are known exactly. So neither the quadrature behind it nor the guess at how
gradients grow with t can bias the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.flexmdm.schedules import Schedules


@dataclass(frozen=True)
class TimeDensity:
    """A piecewise constant density on (0, 1).

    Attributes:
        edges: float64 [K + 1], the ends of the bins, from 0 to 1.
        cumulative: float64 [K + 1], the distribution function there, rising strictly from 0 to 1.
    """

    edges: Tensor
    cumulative: Tensor

    @classmethod
    def of_masses(cls, edges: Tensor, masses: Tensor) -> TimeDensity:
        """Bins with these masses, float64 [K], positive, brought to a sum of 1."""
        cumulative = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
        return cls(edges, cumulative / cumulative[-1])

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t with this density, which rises with u, and the weight 1 / q(t), of u uniform on (0, 1); all float64."""
        u = u.double()
        bins = torch.searchsorted(self.cumulative, u, right=True).clamp(1, len(self.edges) - 1) - 1
        weights = (self.edges.diff() / self.cumulative.diff())[bins]
        t = self.edges[bins] + (u - self.cumulative[bins]) * weights
        return t.clamp(2.0**-53, 1 - 2.0**-53), weights  # rounding could make it 0 or 1


IMPORTANCE = 0.25
"""Share of the draws that follow the gradient's size; measured by benchmarks/gradient_variance.py."""

_TINY = 1e-300
"""Where fewer tokens than this are not yet unmasked, there are no masks to speak of."""

UNIFORM = TimeDensity(*2 * [torch.tensor([0.0, 1.0], dtype=torch.float64)])
"""t = u, and all weights are 1."""


def bin_edges() -> Tensor:
    """float64 [K + 1]: bins of equal ratio in 1 - t down to 1e-6, where hazards are cut off, and one for the rest."""
    left = torch.logspace(0, -6, 256, dtype=torch.float64)
    return 1 - torch.cat([left, left.new_zeros(1)])


def mask_probability(schedules: Schedules, edges: Tensor) -> Tensor:
    """P(a token is a mask) at the middle of each bin: (1 - beta(t)) times the integral of d alpha / (1 - beta) up to t.

    By the midpoint rule over the bins, a jump of alpha at 0 included. float64 [K].
    """
    middle, survival = (edges[1:] + edges[:-1]) / 2, schedules.unmasking.survival
    alpha = schedules.alpha(edges)
    gained = alpha.diff() / survival(middle).clamp(min=_TINY)
    return survival(middle) * (alpha[0] / survival(edges[0]) + gained.cumsum(0) - gained / 2)


def importance_density(schedules: Schedules) -> TimeDensity:
    """What training draws t from: a share IMPORTANCE by beta' / (1 - beta) sqrt(P(mask)), the rest uniform.

    The former is the root mean square of the unmasking term's gradient, a hazard times a sum over masks, where the
    gradients of tokens are independent. For linear schedules its square goes like -log(1 - t) / (1 - t), and uniform t
    meets nearly all of that in rare draws near t = 1. The insertion term has no such tail, since insertion ends at
    alpha_end. The uniform share keeps its variance, and the lengths of x_t, near what they were, and all weights below
    1 / (1 - IMPORTANCE).
    """
    edges = bin_edges()
    middle = (edges[1:] + edges[:-1]) / 2
    masses = schedules.unmasking_hazard(middle) * mask_probability(schedules, edges).sqrt() * edges.diff()
    return TimeDensity.of_masses(edges, IMPORTANCE * masses / masses.sum() + (1 - IMPORTANCE) * edges.diff())
