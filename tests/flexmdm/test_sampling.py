"""What the samplers promise whatever the model says; their law is tested against the exact model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.flexmdm import (
    FlexMDMConfig,
    FlexMDMForMaskedDiffusion,
    Geometric,
    Linear,
    PackedSequences,
    Power,
    Schedules,
)
from retrofit.flexmdm.sampling import (
    Prompt,
    _Clock,
    binomial_quantile,
    draw_tokens,
    most_confident,
    poisson_quantile,
    sample_flexmdm,
)

MASK, PAD, HEADER = 10, 11, 9
CONFIG = {
    "vocab_size": 12,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": 16,
    "max_sequence_length": 32,
    "mask_token_id": MASK,
    "pad_token_id": PAD,
    "eos_token_id": PAD,
    "mean_deletable_tokens": 6.0,
    "banned_token_ids": [HEADER],
}


class Scripted:
    """A model that expects `gap` tokens in every gap and likes token `favourite`, and remembers what it was shown."""

    def __init__(self, gap: float, favourite: int = 3, **config: Any):
        self.config = FlexMDMConfig(**{**CONFIG, **config})
        self.gap = gap
        self.favourite = favourite
        self.calls: list[tuple[PackedSequences, torch.Tensor]] = []

    def __call__(self, packed: PackedSequences, timesteps: torch.Tensor) -> SimpleNamespace:
        self.calls.append((packed, timesteps))
        masks = int((packed.tokens == MASK).sum())
        logits = torch.zeros(masks, 12)
        logits[:, self.favourite] = 30.0
        alpha = self.config.schedules.alpha(timesteps)[packed.sequence_ids]
        return SimpleNamespace(logits=logits, expected_gaps=self.gap * (1 - alpha))


def network() -> FlexMDMForMaskedDiffusion:
    torch.manual_seed(0)
    model = FlexMDMForMaskedDiffusion(FlexMDMConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PROMPTS = [Prompt([]), Prompt([1, 2, 3]), Prompt([4, 5], [True, True, False]), Prompt([6], [False, True])]


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("counts", ["binomial", "poisson"])
def test_kept_tokens_stay_and_nothing_forbidden_is_written(order: str, counts: str) -> None:
    samples = sample_flexmdm(network(), PROMPTS * 8, steps=6, order=order, counts=counts, banned_token_ids=[0])
    for prompt, sample in zip(PROMPTS * 8, samples, strict=True):
        assert [t for t, k in zip(sample.token_ids, sample.kept, strict=True) if k] == list(prompt.token_ids)
        written = {t for t, k in zip(sample.token_ids, sample.kept, strict=True) if not k}
        assert not written & {MASK, PAD, HEADER, 0}
    assert any(
        len(sample.token_ids) > len(prompt.token_ids) for prompt, sample in zip(PROMPTS * 8, samples, strict=True)
    )


def test_closed_gaps_stay_empty_and_open_ones_fill() -> None:
    model = Scripted(gap=5.0)
    prompt = Prompt([1, 2, 4], [False, True, False, False])
    for sample in sample_flexmdm(model, [prompt] * 20, steps=8):
        assert sample.token_ids[0] == 1 and sample.token_ids[-2:] == [2, 4]
        assert set(sample.token_ids[1:-2]) == {3}


def test_a_prompt_without_flags_is_continued() -> None:
    for sample in sample_flexmdm(Scripted(gap=5.0), [Prompt([1, 2])] * 5, steps=8):
        assert sample.token_ids[:2] == [1, 2] and len(sample.token_ids) > 2


def test_insertion_happens_in_the_last_step_too() -> None:
    """One leap only: all tokens come from it, and the forward after it unmasks them."""
    model = Scripted(gap=5.0)
    samples = sample_flexmdm(model, [Prompt([])] * 50, steps=1)
    assert all(len(s.token_ids) >= 4 and set(s.token_ids) == {3} for s in samples)
    # The leap, one forward for what it inserted, and the closing step's look.
    assert samples[0].forwards == len(model.calls) == 3
    assert [float(t[0]) for _, t in model.calls] == [0.0, 1.0, 1.0]


def test_the_closing_step_inserts_what_is_still_expected() -> None:
    """alpha_end at one half: half of the tokens are left to the closing step, which rounds the expected gap."""

    class OneMissing(Scripted):
        def __call__(self, packed: PackedSequences, timesteps: torch.Tensor) -> SimpleNamespace:
            out = super().__call__(packed, timesteps)
            first = packed.cu_seqlens[:-1].long()
            out.expected_gaps = torch.zeros(packed.tokens.numel())
            out.expected_gaps[first] = (packed.lengths == 1).float() * 0.9
            return out

    samples = sample_flexmdm(OneMissing(0.0, alpha_end=0.5), [Prompt([])] * 100, steps=4)
    assert all(sample.token_ids == [3] for sample in samples)
    assert sample_flexmdm(Scripted(0.0), [Prompt([])], steps=4)[0].token_ids == []


def test_the_length_limit_holds_keeps_the_rest_and_is_told() -> None:
    model = Scripted(gap=100.0)
    prompt = Prompt([1, 2], [True, True, True])
    sample = sample_flexmdm(model, [prompt], steps=4, max_length=12)[0]
    assert sample.truncated and len(sample.token_ids) == 12
    first, second = (sample.token_ids.index(token) for token in (1, 2))
    # The cut is spread: each of the three gaps keeps some of its insertions.
    assert first > 0 and second > first + 1 and second < 11
    assert not sample_flexmdm(Scripted(gap=0.0), [prompt], steps=4, max_length=12)[0].truncated


def test_noise_belongs_to_the_sequence_not_to_the_batch() -> None:
    model = network()
    together = sample_flexmdm(model, PROMPTS, steps=5, seed=3)
    assert together != sample_flexmdm(model, PROMPTS, steps=5, seed=4)
    for index, prompt in enumerate(PROMPTS):
        alone = sample_flexmdm(model, [prompt], steps=5, seed=3, indices=[index])[0]
        assert alone.token_ids == together[index].token_ids
    backwards = sample_flexmdm(model, PROMPTS[::-1], steps=5, seed=3, indices=[3, 2, 1, 0])
    assert [s.token_ids for s in backwards[::-1]] == [s.token_ids for s in together]


def test_sampling_leaves_the_mode_and_the_global_generator_alone() -> None:
    model = network().train()
    state = torch.get_rng_state()
    sample_flexmdm(model, PROMPTS, steps=3)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_generate_is_the_sampler() -> None:
    model = network()
    assert model.generate(PROMPTS, steps=4, seed=1) == sample_flexmdm(model, PROMPTS, steps=4, seed=1)
    assert len(model.generate(steps=4)) == 1
    assert sample_flexmdm(model, [], steps=4) == []


def test_under_other_schedules_the_model_is_told_the_sampler_alpha() -> None:
    model = Scripted(gap=4.0)
    sample_flexmdm(model, [Prompt([])], steps=4, schedules=Schedules(Power(2.0), Linear()))
    times = [float(t[0]) for _, t in model.calls[:4]]
    assert times == pytest.approx([0.0, 1 - 0.75**2, 1 - 0.5**2, 1 - 0.25**2])


def test_insertion_goes_no_further_than_the_model_was_trained() -> None:
    """A geometric schedule ends at alpha = .990: under a linear one the sampler must not insert on to .999."""
    model = Scripted(gap=0.0, insertion_schedule=Geometric().to_dict())
    clock = _Clock(model.config, Schedules(Linear(), Linear()))
    assert clock.insertion_fraction(0.0, 1.0) == pytest.approx(0.990, abs=1e-4)
    assert clock.insertion_fraction(0.995, 1.0) == 0


def test_where_insertion_ends_earlier_the_model_is_told_so() -> None:
    for time_input in ("alpha", "t"):
        model = Scripted(gap=4.0, time_input=time_input)
        sample_flexmdm(model, [Prompt([])], steps=4, schedules=Schedules(Linear(), Linear(), alpha_end=0.4))
        assert [float(t[0]) for _, t in model.calls[:4]] == pytest.approx([0.0, 0.25, 0.4, 0.4])


def test_a_model_of_raw_t_refuses_another_insertion_schedule() -> None:
    model = Scripted(gap=4.0, time_input="t")
    sample_flexmdm(model, [Prompt([])], steps=2, schedules=Schedules(Linear(), Power(2.0)))
    with pytest.raises(ValueError, match="time_input"):
        sample_flexmdm(model, [Prompt([])], steps=2, schedules=Schedules(Power(2.0), Linear()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"order": "left"}, "order"),
        ({"counts": "normal"}, "counts"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_length": 32}, "at most 31"),
        ({"prompts": [Prompt([1] * 40)]}, "prompt 0: its 40 tokens"),
        ({"prompts": [Prompt([]), Prompt([1], [True])]}, "prompt 1: 1 tokens have 2 gaps"),
        ({"prompts": [Prompt([12])]}, "outside the vocabulary"),
        ({"prompts": [Prompt([MASK])]}, "open a gap instead"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_flexmdm(Scripted(1.0), settings.pop("prompts", [Prompt([])]), **{"steps": 2, **settings})


def test_the_trace_shows_every_step() -> None:
    seen: list[tuple[int, float, list[list[int]]]] = []
    samples = sample_flexmdm(Scripted(4.0), [Prompt([1])], steps=4, trace=lambda *row: seen.append(row))
    assert [row[:2] for row in seen] == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.0)]
    assert seen[-1][2] == [samples[0].token_ids]


def test_counts_have_the_laws_they_are_named_after() -> None:
    u = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000
    for n, p in ((7, 0.3), (300, 0.02), (1, 0.999), (900, 0.98)):
        counts = binomial_quantile(u, torch.full_like(u, n), p).double()
        assert counts.max() <= n
        assert counts.mean() == pytest.approx(n * p, rel=1e-3)
        assert counts.var() == pytest.approx(n * p * (1 - p), rel=5e-3)
    for mean in (0.5, 3.0, 400.0):
        counts = poisson_quantile(u, torch.full_like(u, mean)).double()
        assert counts.mean() == pytest.approx(mean, rel=1e-3) and counts.var() == pytest.approx(mean, rel=5e-3)
    edge = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert binomial_quantile(edge, torch.tensor([0.0, 4.0], dtype=torch.float64), 1.0).tolist() == [0, 4]
    assert binomial_quantile(edge, torch.tensor([3.0, 4.0], dtype=torch.float64), 0.0).tolist() == [0, 0]


def test_tokens_are_drawn_from_the_distribution_at_the_temperature() -> None:
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(10_000, 4)
    banned = torch.tensor([3])
    for temperature in (0.5, 1.0, 2.0):
        tokens, _ = draw_tokens(logits, u, temperature, banned)
        expected = (torch.tensor([0.0, 1.0, 2.0]) / temperature).softmax(-1)
        assert torch.allclose(tokens.bincount(minlength=4)[:3] / 10_000, expected, atol=1e-3)
        assert not (tokens == 3).any()
    assert (draw_tokens(logits, u, 0.0, banned)[0] == 2).all()
    extremes = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(logits[:2], extremes, 1.0, torch.tensor([0, 3]))[0].tolist() == [1, 2]


def test_confidence_takes_as_many_and_the_best_of_each_sequence() -> None:
    confidence = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8, 0.7])
    groups = torch.tensor([0, 0, 0, 2, 2, 3])
    chosen = torch.tensor([True, True, False, True, False, False])
    assert most_confident(confidence, groups, chosen).tolist() == [False, True, True, False, True, False]
