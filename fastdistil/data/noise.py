"""Counter-based random numbers: a hash of (seed, stream, epoch, sequence, position), computed where it is
used.

A generator's numbers depend on how many were drawn before. A hash depends on its arguments only, so the noise
of one token is the same whether its sequence sits in a batch of 8 or of 256, on rank 0 or rank 3, before or
after a resume, and no generator state has to be saved. The mixing is SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators"), in wrapping int64 arithmetic that every torch device has.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK64 = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK64
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK64
    return z ^ (z >> 31)


def _logical_shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: the copies of the sign bit are masked away.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _logical_shift_right(z, 30)) * _signed(_MIX1)
    z = (z ^ _logical_shift_right(z, 27)) * _signed(_MIX2)
    return z ^ _logical_shift_right(z, 31)


def noise_bits(seed: int, stream: int, *counters: Tensor | int) -> Tensor:
    """64 hashed bits for each element of the broadcast of `counters`.

    Args:
        seed: of the run.
        stream: a small number that tells independent uses of the same counters apart.
        counters: int64 tensors or ints of broadcastable shapes, at least one of them a tensor, such as
            epoch (B, 1), sequence (B, 1), position (1, L). Their order matters.

    Returns:
        int64, the broadcast shape; all 64 bits are uniform.
    """
    state = _mix_int((_mix_int(seed & _MASK64) + (stream + 1) * _GOLDEN) & _MASK64)
    bits: Tensor | None = None
    for counter in counters:
        if isinstance(counter, Tensor):
            bits = _mix((counter + 1) * _signed(_GOLDEN) + (_signed(state) if bits is None else bits))
        elif bits is not None:
            bits = _mix(bits + _signed((counter + 1) * _GOLDEN))
        else:
            state = _mix_int((state + (counter + 1) * _GOLDEN) & _MASK64)
    assert bits is not None, "noise_bits needs at least one tensor counter"
    return bits


def uniform(bits: Tensor) -> Tensor:
    """float32 in the open interval (0, 1) from the top 23 bits, so that neither end is ever reached."""
    return (_logical_shift_right(bits, 41).float() + 0.5) * 2.0**-23


def below(bits: Tensor, bound: int) -> Tensor:
    """int64 in [0, bound). The modulo's bias, bound / 2^63, is far below what any run could notice."""
    return _logical_shift_right(bits, 1) % bound


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(n), int64 (n,), a function of (n, seed, epoch) on every torch version."""
    return noise_bits(seed, 0, epoch, torch.arange(n)).argsort(stable=True)
