"""Counter-based random numbers: a draw is a function of its key, never of what was drawn before it.

Training noise is keyed by (seed, ordinal, position), sampling noise by (seed, sequence, step, position). Workers,
ranks, batch composition and resumption therefore cannot change a draw. The generator chains the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) over the counters, in wrapping
int64 arithmetic, so that it is the same on every device.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

_ALL_ONES = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_FEISTEL_ROUNDS = 6


def _signed(value: int) -> int:
    """The int64 with the same bits as `value` modulo 2^64."""
    value &= _ALL_ONES
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser, in place: `x` must be nobody else's."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MULTIPLIERS[0]))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MULTIPLIERS[1]))
    return x.bitwise_xor_(_shift_right(x, 31))


def _mix_number(x: int) -> int:
    """`_mix` of a number below 2^64: keys begin with a few, and torch is slow where there is one element."""
    x = (x ^ x >> 30) * _MULTIPLIERS[0] & _ALL_ONES
    x = (x ^ x >> 27) * _MULTIPLIERS[1] & _ALL_ONES
    return x ^ x >> 31


def _absorb(bits: Tensor, counter: int | Tensor) -> Tensor:
    """The random bits after one more counter."""
    if not isinstance(counter, Tensor):
        return _mix(bits ^ _signed(counter * _WEYL + _MULTIPLIERS[0]))
    return _mix((counter * _signed(_WEYL)).add_(_signed(_MULTIPLIERS[0])) ^ bits)


def _keyed_bits(seed: int, *counters: int | Tensor) -> Tensor:
    """64 random bits, int64, for each element of the broadcast counters."""
    number, left = _mix_number((seed * _WEYL + _WEYL) & _ALL_ONES), list(counters)
    while left and not isinstance(left[0], Tensor):
        number = _mix_number(number ^ (int(left.pop(0)) * _WEYL + _MULTIPLIERS[0]) & _ALL_ONES)
    return reduce(_absorb, left, torch.tensor(_signed(number)))


def _uniform(bits: Tensor) -> Tensor:
    # 52 bits: with 53, the half added to the largest would round up to 1.
    return _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)


def keyed_uniform(seed: int, *counters: int | Tensor) -> Tensor:
    """Uniform draws in the open interval (0, 1), one for each element of the broadcast counters.

    Args:
        seed: any integer; taken modulo 2^64.
        counters: integers or int64 tensors that broadcast together. Their order matters.

    Returns:
        float64 tensor of the broadcast shape (a scalar tensor if all counters are integers).

    Example:
        keyed_uniform(0, ordinals[:, None], torch.arange(length))  # [B, length]
    """
    return _uniform(_keyed_bits(seed, *counters))


def ragged_uniform(lengths: Tensor, seed: int, *counters: int | Tensor) -> Tensor:
    """`keyed_uniform(seed, *counters[:, None], torch.arange(L))` at the positions below `lengths`, row after row.

    Args:
        lengths: int64 [B]; T is their sum.
        counters: integers or int64 tensors [B], a tensor at least one of them.

    Returns:
        float64 [T].
    """
    size = int(lengths.sum())
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=size)
    positions = torch.arange(size, device=lengths.device).sub_(starts)
    bits = _keyed_bits(seed, *counters).repeat_interleave(lengths, output_size=size)
    return _uniform(_absorb(bits, positions))


def keyed_permutation(size: int, seed: int, *counters: int) -> Tensor:
    """A uniformly random permutation of range(size), int64 [size], that depends on its key alone."""
    return keyed_uniform(seed, *counters, torch.arange(size)).argsort()


def permuted(places: Tensor, size: int, seed: int, *counters: int) -> Tensor:
    """Where a random permutation of range(size) sends `places`, without making the whole of it.

    A Feistel network on the square just above `size`, adding modulo its side, walked on until it lands inside (Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Small squares have few such permutations: below
    some thousands take `keyed_permutation`.

    Args:
        places: int64 [N] in range(size).

    Returns:
        int64 [N].
    """
    side = math.isqrt(size - 1) + 1
    keys = [_keyed_bits(seed, *counters, turn) for turn in range(_FEISTEL_ROUNDS)]

    def mixed(x: Tensor) -> Tensor:
        left, right = x // side, x % side
        for key in keys:
            left, right = right, (left + _shift_right(_absorb(key, right), 2)) % side
        return left * side + right

    out = mixed(places)
    while (outside := out >= size).any():
        out[outside] = mixed(out[outside])
    return out
