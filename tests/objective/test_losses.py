from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrofit.flexmdm import Linear, Schedules
from retrofit.objective import corrupt, flexmdm_loss
from retrofit.objective.losses import insertion_sums

GOLDEN = Path(__file__).parent.parent / "golden" / "interpolant" / "linear.safetensors"
LINEAR = Schedules(Linear(), Linear())


def test_losses_equal_the_published_ones() -> None:
    golden = load_file(GOLDEN)
    corrupted = corrupt(
        golden["x1"],
        golden["lengths"],
        golden["t"],
        kept=golden["prompt_mask"].bool(),
        schedules=LINEAR,
        mask_token_id=382,
        pad_token_id=380,
        insertion_time=golden["insertion_time"],
        unmasking_time=golden["unmasking_time"],
    )
    loss = flexmdm_loss(golden["token_logits"], golden["expected_gaps"], corrupted, golden["t"], schedules=LINEAR)
    for found, name in ((loss.unmasking, "unmask"), (loss.insertion, "insertion")):
        expected = golden[f"{name}_loss_per_sequence"]
        # Measured: 4.6e-6 and 6.4e-6.
        assert (found - expected).abs().max() / expected.abs().max() < 2e-5
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_dense_loss_leaves_the_caller_s_logits_as_they_are() -> None:
    golden = load_file(GOLDEN)
    corrupted = corrupt(
        golden["x1"], golden["lengths"], golden["t"], kept=golden["prompt_mask"].bool(), schedules=LINEAR,
        mask_token_id=382, pad_token_id=380, key=(0, torch.arange(len(golden["t"]))),
    )  # fmt: skip
    logits = golden["token_logits"].clone().requires_grad_()
    loss = flexmdm_loss(logits, golden["expected_gaps"], corrupted, golden["t"], schedules=LINEAR)
    loss.unmasking.sum().backward()
    assert logits.grad is not None and bool((logits.grad[corrupted.masked] != 0).any())
    assert torch.equal(logits, golden["token_logits"])


def test_phi_is_zero_at_the_truth_and_smallest_at_the_mean() -> None:
    gaps = torch.tensor([0, 1, 5, 5])
    everywhere = torch.ones(4, dtype=torch.bool)
    one = torch.zeros(4, dtype=torch.long)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return insertion_sums(y, gaps, everywhere, one, torch.ones(1))[0]

    assert loss(gaps.float()) == 0
    mean = gaps.float().mean().requires_grad_()
    (slope,) = torch.autograd.grad(loss(mean.expand(4)), mean)
    assert slope.abs() < 1e-6
    assert loss(torch.full((4,), 2.0)) > loss(torch.full((4,), 2.75))


def test_closed_gaps_cost_nothing_and_weights_scale_each_sequence() -> None:
    y, gaps = torch.tensor([3.0, 2.0, 4.0]), torch.tensor([1, 1, 1])
    sequence = torch.tensor([0, 0, 1])
    every = insertion_sums(y, gaps, torch.tensor([True, True, True]), sequence, torch.tensor([1.0, 1.0]))
    some = insertion_sums(y, gaps, torch.tensor([False, True, True]), sequence, torch.tensor([1.0, 10.0]))
    only = insertion_sums(y[1:], gaps[1:], torch.tensor([True, True]), sequence[1:], torch.tensor([1.0, 1.0]))
    assert some[0] == only[0] < every[0] and some[1] == pytest.approx(10 * float(every[1]))
