"""How much the step's gradient varies with the density of t: unmasking, insertion and their sum, on real data.

    python -m benchmarks.gradient_variance --data runs/gsm8k --model runs/toy --schedules linear
    python -m benchmarks.gradient_variance --data runs/gsm8k --model runs/toy-gsm8k/final --stream-steps 150

Gradients of single documents are measured once, at t spread over bins of equal ratio in 1 - t, and serve for every
density q: G(t) being the gradient of one document's loss at t, the mean over D draws of G(t) / q(t) has the variance

    (1 / D) (integral of E|G(t)|^2 / q(t) dt  -  |integral of E G(t) dt|^2)

where the draws are independent; where they are stratified, the integral of E G in each of the D strata is squared and
D times their sum taken off. So what uniform t leaves to rare, huge gradients near t = 1 counts in full, which no
affordable number of steps would show. A document without masks has no gradient once insertion has ended: it is drawn
and counted, not computed.

Squared norms are exact; for the means, gradients are folded into WIDTH numbers with random signs, which keeps inner
products on average. Standard errors are jackknifed over groups of draws. `--stream-steps` checks the figures of
stratified t against whole steps of the real stream.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.checkpoints.loading import load_model, model_config, resolve
from retrofit.data.store import TokenStore
from retrofit.data.stream import StepStream
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, Schedules
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.objective import FlexMDMObjective, MicroBatch
from retrofit.objective.times import (
    UNIFORM,
    TimeDensity,
    bin_edges,
    insertion_masses,
    mask_probability,
    unmasking_masses,
)

TERMS = ("unmasking", "insertion", "total")
WIDTH = 2048
GROUPS = 16
DOCUMENTS_PER_STEP = 16
MOST_DRAWS = 16384  # of one bin
QUANTILES = (0.5, 0.99, 0.999)
POWER = {
    "insertion_schedule": {"type": "power", "exponent": 1.7},
    "unmasking_schedule": {"type": "power", "exponent": 2.89},
}


class Gradients:
    """The gradient of each term, and its folded form."""

    def __init__(self, model: FlexMDMForMaskedDiffusion, objective: FlexMDMObjective) -> None:
        self.model, self.objective = model, objective
        self.parameters = list(model.parameters())
        size = sum(p.numel() for p in self.parameters)
        generator = torch.Generator().manual_seed(0)
        self.places = torch.randint(WIDTH, (size,), generator=generator)
        self.signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Squared norms float64 [3] of unmasking, insertion and their sum, and folded gradients float32 [3, WIDTH]."""
        terms = self.objective.loss_terms(self.model, batch)
        whole = torch.zeros(3, len(self.places))
        for row, name in enumerate(TERMS[:2]):
            if not terms[name].any():
                continue
            grads = torch.autograd.grad(terms[name].sum(), self.parameters, retain_graph=row == 0, allow_unused=True)
            pairs = zip(grads, self.parameters, strict=True)
            whole[row] = torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs])
        whole[2] = whole[0] + whole[1]
        folded = torch.zeros(2, WIDTH).index_add(1, self.places, whole[:2] * self.signs)
        return whole.double().square().sum(1), torch.cat([folded, folded.sum(0, keepdim=True)])


@dataclass(frozen=True)
class Draws:
    """Gradients of N single documents, t uniform within each of K bins.

    Attributes:
        edges: float64 [K + 1], the ends of the bins. counts: int64 [GROUPS, K], draws, with those without a gradient.
        t: float64 [N]. bins, groups: int64 [N]. squares: float64 [3, N]. folded: float32 [3, N, WIDTH].
    """

    edges: Tensor
    counts: Tensor
    t: Tensor
    bins: Tensor
    groups: Tensor
    squares: Tensor
    folded: Tensor

    def without(self, group: int) -> Draws:
        """All groups but one."""
        rest, counts = self.groups != group, self.counts.clone()
        counts[group] = 0
        rows = {name: getattr(self, name)[rest] for name in ("t", "bins", "groups")}
        return replace(self, counts=counts, squares=self.squares[:, rest], folded=self.folded[:, rest], **rows)

    @property
    def shares(self) -> Tensor:
        """float64 [K]: the part of an integral over t that one draw of a bin stands for."""
        return self.edges.diff() / self.counts.sum(0)


def draw_gradients(store: TokenStore, gradients: Gradients, *, per_bin: int, seed: int = 0) -> Draws:
    """About `per_bin` gradients in each bin up to the end of insertion, and half as many in those after it."""
    objective, schedules = gradients.objective, gradients.objective.schedules
    edges = torch.cat([1 - torch.exp(-torch.arange(29, dtype=torch.float64) / 2), torch.ones(1).double()])
    with_masks = (store.manifest.mean_deletable_tokens * mask_probability(schedules, edges)).clamp(max=1)
    inserts = schedules.insertion_hazard(edges[:-1]) > 0
    wanted = torch.where(inserts, per_bin, per_bin / 2 / with_masks).clamp(max=MOST_DRAWS)
    counts = (wanted / GROUPS).ceil().long().expand(GROUPS, -1)
    bins = torch.arange(len(edges) - 1).repeat_interleave(counts.sum(0))
    rows = []
    for ordinals in torch.arange(len(bins)).split(256):
        k = bins[ordinals]
        t = edges[k] + edges.diff()[k] * keyed_uniform(seed, 301, ordinals)
        index = (keyed_uniform(seed, 302, ordinals) * len(store)).long()
        examples = objective.prepare(store.documents(index.tolist()), ordinals, t)
        has_gradient = examples.corrupted.masked.any(1) | (schedules.insertion_hazard(t) > 0)
        for row in has_gradient.nonzero().flatten().tolist():
            rows.append((t[row], k[row], ordinals[row] % GROUPS, *gradients(examples.micro_batch([row]))))
    t, bins, groups, squares, folded = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(edges, counts, t, bins, groups, squares.T, folded.transpose(0, 1).contiguous())


def squared_means(draws: Draws, stratum: Tensor, strata: int) -> Tensor:
    """float64 [3]: sum over strata of |integral of E G over the stratum|^2, without bias. stratum: int64 [N]."""
    n, counts, share = len(draws.edges) - 1, draws.counts.sum(0), draws.shares
    cell = stratum * n + draws.bins
    found = []
    for folded in draws.folded:
        sums = torch.zeros(strata * n, WIDTH).index_add(0, cell, folded).double().view(strata, n, WIDTH)
        squares = torch.zeros(strata * n).double().index_add(0, cell, folded.double().square().sum(1)).view(strata, n)
        noise = (squares - sums.square().sum(2) / counts) * counts / (counts - 1)  # of sums, by bin
        mean = (share[:, None] * sums).sum(1)
        found.append(mean.square().sum() - (share**2 * noise).sum())
    return torch.stack(found)


def variances(draws: Draws, density: TimeDensity) -> Tensor:
    """float64 [2, 3]: variance of the mean over a step, t independent and stratified, by term."""
    u, weights = place(density, draws.t)
    second = (draws.shares[draws.bins] * weights * draws.squares).sum(1)
    rows = []
    for strata in (1, DOCUMENTS_PER_STEP):
        means = squared_means(draws, (u * strata).long().clamp(max=strata - 1), strata)
        rows.append((second - strata * means) / DOCUMENTS_PER_STEP)
    return torch.stack(rows)


def place(density: TimeDensity, t: Tensor) -> tuple[Tensor, Tensor]:
    """The u that `density` takes to t, and the weight there."""
    bins = torch.searchsorted(density.edges, t, right=True).clamp(1, len(density.edges) - 1) - 1
    weights = density.edges.diff()[bins] / density.cumulative.diff()[bins]
    return density.cumulative[bins] + (t - density.edges[bins]) / weights, weights


def candidates(schedules: Schedules, draws: Draws) -> dict[str, TimeDensity]:
    """The densities that are compared."""
    edges = bin_edges()
    u, i, flat = unmasking_masses(schedules, edges), insertion_masses(schedules, edges), edges.diff()
    n = len(draws.edges) - 1
    measured = torch.zeros(n).double().index_add(0, draws.bins, draws.squares[2]) / draws.counts.sum(0)
    shapes = {
        "unmasking": 0.98 * u + 0.02 * flat,
        "insertion": 0.98 * i + 0.02 * flat,
        "both": 0.5 * u + 0.5 * i,
        "both, a quarter uniform": 0.375 * u + 0.375 * i + 0.25 * flat,
        "half uniform": 0.25 * u + 0.25 * i + 0.5 * flat,
    }
    found = {"uniform": UNIFORM, **{name: TimeDensity.of_masses(edges, masses) for name, masses in shapes.items()}}
    found["measured optimum"] = TimeDensity.of_masses(
        draws.edges, draws.edges.diff() * (measured.sqrt() + 1e-3 * measured.sqrt().mean())
    )
    return found


@dataclass(frozen=True)
class Norms:
    """Gradient norms of steps, normalised as in training, and what clipping at 1 does to the mean gradient.

    Attributes:
        quantiles: of the norm, at QUANTILES. clipped: share of the steps with a larger norm than 1.
        kept: by term, what of the mean gradient is left in the mean of the clipped ones, along it.
    """

    quantiles: list[float]
    clipped: float
    kept: list[float]


def simulate(draws: Draws, density: TimeDensity, window: int, *, strata: int, steps: int = 20000) -> Norms:
    """Steps put together from the measured documents: t drawn from the density, then one of the draws of t's bin."""
    scale = 1 / (DOCUMENTS_PER_STEP * window)
    by_bin = draws.bins.argsort(stable=True)
    held = draws.bins.bincount(minlength=len(draws.edges) - 1)
    starts = held.cumsum(0) - held
    norms, sums, clipped_sums = [], torch.zeros(3, WIDTH).double(), torch.zeros(3, WIDTH).double()
    for step in torch.arange(steps).split(250):
        ordinals = (step[:, None] * DOCUMENTS_PER_STEP + torch.arange(DOCUMENTS_PER_STEP)).flatten()
        u = keyed_uniform(0, 311, ordinals)
        t, weights = density.draw((ordinals % strata + u) / strata)
        k = torch.searchsorted(draws.edges, t, right=True) - 1
        choice = (keyed_uniform(0, 312, ordinals) * draws.counts.sum(0)[k]).long()
        exists = choice < held[k]  # the others have no gradient
        row = by_bin[(starts[k] + choice).clamp(max=len(by_bin) - 1)]
        weights = (weights * exists * scale).float()
        each = (draws.folded[:, row] * weights[:, None]).view(3, len(step), DOCUMENTS_PER_STEP, WIDTH).sum(2)
        norm = each[2].norm(dim=1)
        norms.append(norm)
        sums += each.double().sum(1)
        clipped_sums += (each * (1 / norm.clamp(min=1))[:, None]).double().sum(1)
    norm = torch.cat(norms).double()
    kept = ((clipped_sums * sums).sum(1) / sums.square().sum(1)).tolist()
    return Norms(norm.quantile(torch.tensor(QUANTILES).double()).tolist(), float((norm > 1).double().mean()), kept)


def stream_variances(
    store: TokenStore, gradients: Gradients, density: TimeDensity, *, strata: int, steps: int
) -> tuple[Tensor, Tensor]:
    """float64 [3] twice: the sample variance of the gradients of `steps` steps of the real stream, and its error."""
    objective = FlexMDMObjective(gradients.objective.config, seed=1, times=density)
    stream = StepStream(
        store,
        objective,
        seed=1,
        documents_per_step=DOCUMENTS_PER_STEP,
        time_strata=strata,
        max_tokens_per_device=2**20,
        max_steps=steps,
    )
    folded = torch.stack([gradients(stream[step].micro_batches[0])[1] for step in range(steps)], dim=1).double()
    deviations = (folded - folded.mean(1, keepdim=True)).square().sum(2) / DOCUMENTS_PER_STEP**2
    return deviations.sum(1) / (steps - 1), deviations.std(1) / math.sqrt(steps)


def jackknife(estimates: list[Tensor]) -> Tensor:
    """Standard errors from the estimates that leave out one group each."""
    return torch.stack(estimates).std(0, correction=0) * math.sqrt(len(estimates) - 1)


def report(draws: Draws, schedules: Schedules, store: TokenStore, window: int) -> str:
    """Both tables: variances against those of uniform stratified t, and norms."""
    densities = candidates(schedules, draws)
    found = {name: variances(draws, density) for name, density in densities.items()}
    left_out: dict[str, list[Tensor]] = {name: [] for name in densities}
    for group in range(GROUPS):
        rest = draws.without(group)
        for name, density in densities.items():
            left_out[name].append(variances(rest, density))
    now, deletable = found["uniform"][1], store.manifest.mean_deletable_tokens
    kept = store.record.tokens / store.record.documents - deletable
    middle = (torch.arange(4096) + 0.5).double() / 4096
    heads = [f"{term[:9]:>14}" for term in 2 * TERMS]
    lines = [
        f"{'variance of a step against uniform, stratified':<64}{'independent':^42}{'stratified':^42}",
        f"{'density':<26}{'largest weight':>16}{'rows':>8}{'rows x variance':>14}" + "".join(heads),
    ]
    rows_now = kept + 1 + deletable * float(schedules.alpha(middle).mean())
    for name, density in densities.items():
        rows = (kept + 1 + deletable * float(schedules.alpha(density.draw(middle)[0]).mean())) / rows_now
        ratios = found[name] / now
        errors = jackknife([a / b[1] for a, b in zip(left_out[name], left_out["uniform"], strict=True)])
        cells = [f"{r:>9.3f}+{e:.3f}" for r, e in zip(ratios.flatten(), errors.flatten(), strict=True)]
        weight = float((density.edges.diff() / density.cumulative.diff()).max())
        lines.append(f"{name:<26}{weight:>16.2f}{rows:>8.3f}{rows * float(ratios[1, 2]):>14.3f}" + "".join(cells))
    signal = squared_means(draws, torch.zeros_like(draws.bins), 1)
    lines += ["", f"variance over squared mean, uniform stratified: {(now / signal).tolist()}", ""]
    lines.append(f"{'norms':<26}{'50 %':>8}{'99 %':>8}{'99.9 %':>8}{'clipped':>9}   kept of each term's mean")
    for name in ("uniform", CHOSEN):
        for strata in (1, DOCUMENTS_PER_STEP):
            norms = simulate(draws, densities[name], window, strata=strata)
            label = f"{name}, {'stratified' if strata > 1 else 'independent'}"
            lines.append(
                f"{label:<40}" + "".join(f"{x:>8.3f}" for x in norms.quantiles)
                + f"{norms.clipped:>9.4f}   " + " ".join(f"{x:.3f}" for x in norms.kept)
            )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory written by `retrofit preprocess`")
    parser.add_argument("--model", required=True, help="a FlexMDM, or a plain LLaDA, measured as it starts as one")
    parser.add_argument("--schedules", choices=("linear", "power"), default="linear", help="of what was a plain LLaDA")
    parser.add_argument("--window", type=int, default=1024, help="normalises the norms as objective.window does")
    parser.add_argument("--per-bin", type=int, default=64, help="gradients measured in each bin of t")
    parser.add_argument("--stream-steps", type=int, default=0, help="steps of the real stream to measure")
    options = parser.parse_args()
    store = TokenStore.open(options.data, "train")
    if isinstance(model_config(resolve(options.model)), FlexMDMConfig):
        model, _ = load_model(options.model)
    else:
        fields = {"mean_deletable_tokens": store.manifest.mean_deletable_tokens, "time_group_size": 4}
        fields |= POWER if options.schedules == "power" else {}
        model = FlexMDMForMaskedDiffusion.from_pretrained(options.model, flexmdm_config=fields)
    gradients = Gradients(model.eval(), FlexMDMObjective(model.config, seed=0))
    draws = draw_gradients(store, gradients, per_bin=options.per_bin)
    print(report(draws, model.config.schedules, store, options.window))
    if options.stream_steps:
        pass


if __name__ == "__main__":
    main()
