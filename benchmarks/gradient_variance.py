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

import torch
from torch import Tensor

from retrofit.checkpoints.loading import load_model, model_config, resolve
from retrofit.data.store import TokenStore
from retrofit.data.stream import StepStream
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, Schedules
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.objective import FlexMDMObjective, MicroBatch
from retrofit.objective.times import UNIFORM, TimeDensity, bin_edges, importance_density, mask_probability

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
    """The densities that are compared. The gradient of a sum of independent terms grows as hazard sqrt(P)."""
    edges = bin_edges()
    middle, flat = (edges[1:] + edges[:-1]) / 2, edges.diff()
    masks = schedules.unmasking_hazard(middle) * mask_probability(schedules, edges).sqrt() * flat
    deletions = schedules.insertion_hazard(middle) * (1 - schedules.alpha(middle)).sqrt() * flat
    masks, deletions = masks / masks.sum(), deletions / deletions.sum()
    measured = torch.zeros(len(draws.edges) - 1).double().index_add(0, draws.bins, draws.squares[2])
    root = (measured / draws.counts.sum(0)).sqrt()
    mixtures = {
        "masks": masks + 1e-3 * flat,
        "half masks": masks + flat,
        "half deletions": deletions + flat,
        "half masks, half deletions": masks + deletions,
        "a quarter each": masks + deletions + 2 * flat,
    }
    return {
        "uniform": UNIFORM,
        "importance": importance_density(schedules),
        **{name: TimeDensity.of_masses(edges, masses) for name, masses in mixtures.items()},
        "measured optimum": TimeDensity.of_masses(draws.edges, (root + 1e-3 * root.mean()) * draws.edges.diff()),
    }


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


def report_variances(draws: Draws, densities: dict[str, TimeDensity], rows: dict[str, float]) -> None:
    """Prints the variances as multiples of uniform, stratified t's, with their standard errors."""
    rest = [draws.without(group) for group in range(GROUPS)]
    now, now_left_out = variances(draws, UNIFORM)[1], [variances(part, UNIFORM)[1] for part in rest]
    columns = "".join(f"{name:>14}" for name in TERMS)
    print(f"{'':<44}{'independent':^42}{'stratified':^42}\n{'density of t':<28}{'weight':>8}{'rows':>8}{2 * columns}")
    for name, density in densities.items():
        ratios = variances(draws, density) / now
        errors = jackknife([variances(part, density) / old for part, old in zip(rest, now_left_out, strict=True)])
        cells = (f"{r:>8.3f} ±{e:.3f}" for r, e in zip(ratios.flatten(), errors.flatten(), strict=True))
        weight = float((density.edges.diff() / density.cumulative.diff()).max())
        print(f"{name:<28}{weight:>8.2f}{rows[name]:>8.3f}{''.join(cells)}", flush=True)
    signal = squared_means(draws, torch.zeros_like(draws.bins), 1)
    shown = ", ".join(f"{name} {float(x):.2f}" for name, x in zip(TERMS, (now / signal).sqrt(), strict=True))
    print(f"noise over signal of a step, uniform and stratified: {shown}\n")


def report_norms(draws: Draws, densities: dict[str, TimeDensity], window: int) -> None:
    """Prints gradient norms, and what clipping leaves."""
    heads = "".join(f"{f'{100 * q:g} %':>9}" for q in QUANTILES)
    print(f"{'norm of a step':<28}{heads}{'over 1':>9}   left of the mean, clipped at 1: {', '.join(TERMS)}")
    for name in ("uniform", "importance"):
        for strata, how in ((1, "independent"), (DOCUMENTS_PER_STEP, "stratified")):
            norms = simulate(draws, densities[name], window, strata=strata)
            cells = "".join(f"{x:>9.3f}" for x in norms.quantiles)
            left = ", ".join(f"{x:.3f}" for x in norms.kept)
            print(f"{f'{name}, {how}':<28}{cells}{100 * norms.clipped:>7.2f} %   {left}", flush=True)


def report_stream(
    store: TokenStore, gradients: Gradients, draws: Draws, densities: dict[str, TimeDensity], steps: int
) -> None:
    """Prints the variance over whole steps of the real stream, as a multiple of the variance found from documents."""
    print(f"\n{f'{steps} steps of the stream':<28}" + "".join(f"{name:>16}" for name in TERMS))
    for name in ("uniform", "importance"):
        expected = variances(draws, densities[name])[1]
        variance, error = stream_variances(store, gradients, densities[name], strata=DOCUMENTS_PER_STEP, steps=steps)
        cells = zip(variance / expected, error / expected, strict=True)
        print(f"{name:<28}" + "".join(f"{r:>10.2f} ±{e:.2f}" for r, e in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory written by `retrofit preprocess`")
    parser.add_argument("--model", required=True, help="a FlexMDM, or a plain LLaDA, measured as it starts to be one")
    parser.add_argument("--schedules", choices=("linear", "power"), default="linear", help="of what was a plain LLaDA")
    parser.add_argument("--window", type=int, default=1024, help="divides the norms, as objective.window does")
    parser.add_argument("--per-bin", type=int, default=64, help="gradients measured in each bin of t")
    parser.add_argument("--stream-steps", type=int, default=0, help="steps of the real stream to compare with")
    options = parser.parse_args()
    store = TokenStore.open(options.data, "train")
    deletable = store.manifest.mean_deletable_tokens
    if isinstance(model_config(resolve(options.model)), FlexMDMConfig):
        model, _ = load_model(options.model)
    else:
        fields = {"mean_deletable_tokens": deletable, "time_group_size": 4, "time_hidden_size": 256}
        fields |= POWER if options.schedules == "power" else {}
        model = FlexMDMForMaskedDiffusion.from_pretrained(options.model, flexmdm_config=fields)
    schedules = model.config.schedules
    gradients = Gradients(model.eval(), FlexMDMObjective(model.config, seed=0))
    draws = draw_gradients(store, gradients, per_bin=options.per_bin)
    print(f"{options.model} on {options.data}, {schedules}: {len(draws.t)} gradients, steps of {DOCUMENTS_PER_STEP}\n")

    densities = candidates(schedules, draws)
    u = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
    fixed = store.record.tokens / store.record.documents - deletable + 1  # kept tokens and the slot
    rows = {name: fixed + deletable * float(schedules.alpha(q.draw(u)[0]).mean()) for name, q in densities.items()}
    report_variances(draws, densities, {name: x / rows["uniform"] for name, x in rows.items()})
    report_norms(draws, densities, options.window)
    if options.stream_steps:
        report_stream(store, gradients, draws, densities, options.stream_steps)


if __name__ == "__main__":
    main()
