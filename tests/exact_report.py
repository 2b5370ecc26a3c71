"""Prints what the exact model says of loss and sampler, with Monte-Carlo errors: python -m tests.exact_report

About ten minutes on one core, about one with `--quick`.
"""

from __future__ import annotations

import argparse

import torch

from retrofit.flexmdm import Geometric, Linear, Power, Schedules
from tests.exact_model import ExactModel, FiniteData, minimum_loss
from tests.exact_runs import LAWS, SCHEDULES, Estimate, ExactDraws, distance_error, monte_carlo_floor, sample_law

WARPS = {
    "linear": (SCHEDULES["linear"], None),
    "power": (SCHEDULES["power"], None),
    "geometric": (SCHEDULES["geometric"], None),
    "linear, sampled as power": (SCHEDULES["linear"], SCHEDULES["power"]),
    "linear, sampled as geometric": (SCHEDULES["linear"], SCHEDULES["geometric"]),
    "geometric, sampled as linear": (SCHEDULES["geometric"], SCHEDULES["linear"]),
    "linear, unmasked geometrically": (SCHEDULES["linear"], Schedules(Linear(), Geometric())),
    "linear, inserted early": (SCHEDULES["linear"], Schedules(Power(2.9), Linear())),
    "linear, alpha_end .95": (Schedules(Linear(), Linear(), alpha_end=0.95), None),
}


def print_losses(strata: int) -> None:
    """Monte-Carlo loss of the exact model beside the integrated minimum, by term."""
    print(
        f"\nLoss in nats: Monte-Carlo ({2 * strata:,} draws) minus the integrated minimum, standard error, their ratio"
    )
    print(f"{'law':18} {'schedules':10} {'entropy':>8} | {'unmasking':>9} {'diff':>8} {'se':>7} {'z':>5} |", end="")
    print(f" {'insertion':>9} {'diff':>8} {'se':>7} {'z':>5}")
    for name, law in LAWS.items():
        data = FiniteData(law)
        for kind, schedules in SCHEDULES.items():
            draws = ExactDraws(data, schedules, strata=strata, seed=7).losses()
            row = f"{name:18} {kind:10} {data.entropy:8.4f}"
            for values, least in zip((draws.unmasking, draws.insertion), minimum_loss(data, schedules), strict=True):
                estimate = Estimate.of_pairs(values)
                gap = estimate.mean - least
                row += f" | {least:9.5f} {gap:+8.5f} {estimate.error:7.5f} {gap / estimate.error:+5.1f}"
            print(row, flush=True)


def print_entropy() -> None:
    """How far the least loss is below the entropy where at most one token is written."""
    data = FiniteData({"": 0.15, "a": 0.35, "b": 0.3, "c": 0.2})
    print(f"\nEntropy {data.entropy:.6f} of a law of at most one token, minus the least loss, by 1 - alpha_end")
    for kind, schedules in SCHEDULES.items():
        if kind != "geometric":
            ends = {
                e: sum(minimum_loss(data, Schedules(schedules.insertion, schedules.unmasking, alpha_end=1 - e)))
                for e in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
            }
            print(f"{kind:10}", *(f"{e:g}: {data.entropy - least:.6f}  " for e, least in ends.items()))


def print_distances(runs: int, all_steps: list[int]) -> None:
    """Total variation of samples from the data by steps and kind of counts."""
    print(f"\nTotal variation from the data, {runs:,} runs, linear schedules, random order (se: bound on its error)")
    print(
        f"{'law':18} {'floor':>6} {'counts':9} {'steps':>5} {'TV':>7} {'se':>6} {'lengths':>8} {'impossible':>10} short"
    )
    for name, law in LAWS.items():
        data = FiniteData(law)
        floor = monte_carlo_floor(data, runs)
        for counts in ("binomial", "poisson"):
            for steps in all_steps:
                model = ExactModel(data, SCHEDULES["linear"])
                s = sample_law(model, data, runs=runs, steps=steps, counts=counts, seed=1)
                error = distance_error(s.distance, runs)
                print(
                    f"{name:18} {floor:6.4f} {counts:9} {steps:5} {s.distance:7.4f} {error:6.4f}"
                    f" {s.length_distance:8.4f} {s.impossible:10.4f} {s.short:.4f}",
                    flush=True,
                )


def print_warps(runs: int, all_steps: list[int]) -> None:
    """Total variation under other schedules than the model's, and under an early alpha_end."""
    print(f"\nTotal variation by training and sampling schedules, {runs:,} runs, binomial counts")
    print(f"{'law':18} {'schedules':31}", *(f"{steps:>7}" for steps in all_steps), " steps")
    for name, law in LAWS.items():
        data = FiniteData(law)
        for kind, (trained, sampled) in WARPS.items():
            model = ExactModel(data, trained)
            row = [sample_law(model, data, runs=runs, steps=n, schedules=sampled, seed=1).distance for n in all_steps]
            print(f"{name:18} {kind:31}", *(f"{distance:7.4f}" for distance in row), flush=True)


def print_networks(runs: int) -> None:
    """The small networks of the tests: their loss above the least, and their samples."""
    from tests.flexmdm.test_small_network import LAW, excess_loss, train_on

    torch.set_num_threads(1)
    data = FiniteData(LAW)
    print(f"\nSmall networks (d 64, 2 layers), {runs:,} runs at 64 steps")
    for kind in ("linear", "geometric"):
        network = train_on(LAW, insertion_schedule={"type": kind})
        least = sum(minimum_loss(data, network.config.schedules))
        excess = excess_loss(network, LAW)
        print(f"{kind}: {excess.mean:.4f} (se {excess.error:.4f}) above the least loss, {least:.4f}")
        for warp in (None, *SCHEDULES.values()):
            s = sample_law(network, data, runs=runs, steps=64, schedules=warp, seed=1)
            x = sample_law(
                ExactModel(data, network.config.schedules), data, runs=runs, steps=64, schedules=warp, seed=1
            )
            name = "own" if warp is None else next(k for k, v in SCHEDULES.items() if v is warp)
            print(
                f"  sampled as {name:10} TV {s.distance:.4f} (se {distance_error(s.distance, runs):.4f}), lengths "
                f"{s.length_distance:.4f}, impossible {s.impossible:.4f}; exact model {x.distance:.4f}, floor "
                f"{monte_carlo_floor(data, runs):.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs and steps")
    quick = parser.parse_args().quick
    print_losses(2**15 if quick else 2**19)
    print_entropy()
    print_distances(1000 if quick else 10000, [8, 64] if quick else [8, 64, 300])
    print_warps(1000 if quick else 10000, [64] if quick else [64, 300])
    print_networks(1000 if quick else 4000)


if __name__ == "__main__":
    main()
