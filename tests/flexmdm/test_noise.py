import pytest
import torch

from retrofit.flexmdm import noise
from retrofit.flexmdm.noise import keyed_permutation, keyed_uniform, permuted, ragged_uniform


def test_a_draw_depends_on_its_key_alone() -> None:
    ordinals, positions = torch.arange(50), torch.arange(20)
    block = keyed_uniform(7, ordinals[:, None], 3, positions)
    assert block.shape == (50, 20) and block.dtype == torch.float64
    assert keyed_uniform(7, 31, 3, 11) == block[31, 11]
    assert torch.equal(keyed_uniform(7, ordinals.flip(0)[:, None], 3, positions), block.flip(0))


def test_a_draw_is_the_same_whether_its_key_comes_as_numbers_or_as_tensors() -> None:
    for seed, first, second in ((0, 0, 0), (-3, 5, -1), (2**63 + 1, 2**40, 7)):
        number = keyed_uniform(seed, first, second)
        assert number == keyed_uniform(seed, torch.tensor(first), torch.tensor(second))
        assert number == keyed_uniform(seed, first, torch.tensor(second))
        assert number == keyed_uniform(seed, torch.tensor(first), second)


def test_draws_are_what_they_always_were() -> None:
    """Written down once: another value would change what every seed trains on."""
    assert keyed_uniform(7, 31, torch.tensor([0, 11])).tolist() == [0.47978613008671156, 0.9218462514211719]
    assert permuted(torch.arange(3), 100_000, 5, 1).tolist() == [75815, 99712, 22290]


def test_drawing_leaves_the_counters_as_they_are() -> None:
    counters = torch.arange(5), torch.arange(5)
    keyed_uniform(1, *counters)
    assert all(torch.equal(counter, torch.arange(5)) for counter in counters)


def test_ragged_draws_are_those_of_the_rows_cut_to_their_lengths() -> None:
    lengths, ordinals = torch.tensor([3, 0, 1, 5]), torch.tensor([8, 2, 8, 40])
    inside = torch.arange(5) < lengths[:, None]
    rows = keyed_uniform(4, 1, ordinals[:, None], torch.arange(5))
    assert torch.equal(ragged_uniform(lengths, 4, 1, ordinals), rows[inside])
    assert ragged_uniform(lengths[:0], 4, 1, ordinals[:0]).shape == (0,)


@pytest.mark.parametrize("state", [0, -1])
def test_a_draw_is_never_0_or_1(state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even from the state of all zeros or of all ones (-1), which no search would find."""
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, state))
    assert 0 < keyed_uniform(0, torch.tensor(1)) < 1


def test_every_part_of_the_key_matters() -> None:
    position = torch.arange(1000)
    base = keyed_uniform(1, 2, 3, position)
    for other in (keyed_uniform(2, 2, 3, position), keyed_uniform(1, 3, 3, position), keyed_uniform(1, 3, 2, position)):
        assert not torch.equal(base, other)
        assert abs(torch.corrcoef(torch.stack((base, other)))[0, 1]) < 0.1  # 3 standard errors


def test_keys_are_taken_modulo_two_to_the_64() -> None:
    assert keyed_uniform(-1, 5) == keyed_uniform(2**64 - 1, 5)
    assert keyed_uniform(0, -1) == keyed_uniform(0, 2**64 - 1)


def test_draws_are_uniform_along_each_counter() -> None:
    """Kolmogorov-Smirnov at 5e-4 significance (2.0 / sqrt n), along every counter and over a grid of seeds."""
    n = 20_000
    many = torch.arange(n)
    draws = [
        keyed_uniform(0, many),
        keyed_uniform(0, many, 1),
        keyed_uniform(0, 1, many),
        keyed_uniform(0, many * 2**32),
    ]
    draws.append(torch.stack([keyed_uniform(seed, 0) for seed in range(n // 10)]))
    for u in draws:
        u = u.sort().values
        assert u[0] > 0 and u[-1] < 1
        expected = (torch.arange(u.numel()) + 0.5) / u.numel()
        assert (u - expected).abs().max() < 2.0 / u.numel() ** 0.5


def test_neighbouring_draws_are_uncorrelated() -> None:
    u = keyed_uniform(3, torch.arange(300)[:, None], torch.arange(300)) - 0.5
    for product in (u[1:] * u[:-1], u[:, 1:] * u[:, :-1]):
        assert product.mean().abs() < 4 / 12 / product.numel() ** 0.5


def test_a_permutation_holds_each_index_once_and_differs_by_key() -> None:
    first, second = keyed_permutation(100, 0, 1), keyed_permutation(100, 0, 2)
    assert torch.equal(first.sort().values, torch.arange(100))
    assert not torch.equal(first, second)
    assert torch.equal(first, keyed_permutation(100, 0, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4096, 70_000, 99_856, 99_857])
def test_a_permutation_place_by_place_sends_every_place_to_another(size: int) -> None:
    places = torch.arange(size)
    whole = permuted(places, size, 3, 1)
    assert torch.equal(whole.sort().values, places)
    some = torch.randint(size, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted(some, size, 3, 1), whole[some])


def test_a_permutation_place_by_place_is_random() -> None:
    """Over 400 keys: where a place lands is uniform, neighbours land apart, keys have nothing in common (5 sd each)."""
    size, keys = 70_000, 400
    out = torch.stack([permuted(torch.arange(0, size, 100), size, 7, key) for key in range(keys)]).double() / size
    mean, sd = out.mean(0), (1 / 12 / keys) ** 0.5
    assert (mean - 0.5).abs().max() < 5 * sd
    assert (out.square().mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / keys) ** 0.5
    for a, b in ((out[:, 1:], out[:, :-1]), (out[1:], out[:-1])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 5 / a.numel() ** 0.5
    neighbours = permuted(torch.arange(size), size, 7, 0).double().diff().abs() / size
    assert abs(neighbours.mean() - 1 / 3) < 5 * (1 / 18 / size) ** 0.5 * 2  # neighbouring gaps share a place


def test_sixteen_bits_of_place_move_sixteen_bits_of_landing() -> None:
    """Each bit of the landing differs for half of all pairs of places that differ in one bit."""
    places = torch.arange(1 << 16)
    out = permuted(places, 1 << 16, 5)
    for i in range(16):
        flipped = out ^ out[places ^ (1 << i)]
        for j in range(16):
            assert abs(((flipped >> j) & 1).double().mean() - 0.5) < 5 * 0.5 / (1 << 15) ** 0.5
