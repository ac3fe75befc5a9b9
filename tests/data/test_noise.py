"""The hash behind the masking: equal to SplitMix64 in Python integers, uniform, independent between uses."""

import torch

from fastdistil.data.noise import below, noise_bits, permutation, uniform

GOLDEN, MASK64 = 0x9E3779B97F4A7C15, (1 << 64) - 1


def splitmix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def noise_ref(seed: int, stream: int, *counters: int) -> int:
    state = splitmix64((splitmix64(seed) + (stream + 1) * GOLDEN) & MASK64)
    for counter in counters:
        state = splitmix64((state + (counter + 1) * GOLDEN) & MASK64)
    return state - (1 << 64) if state >> 63 else state


def test_splitmix64_of_the_reference_is_the_published_one():
    # The first output of the published generator for seed 0 is its finaliser applied to the golden gamma.
    assert splitmix64(GOLDEN) == 0xE220A8397B1DCDAF


def test_bits_equal_integer_arithmetic():
    epochs, rows, columns = torch.tensor([[0], [7]]), torch.tensor([[3], [2**40]]), torch.arange(5)
    bits = noise_bits(12345, 2, epochs, rows, columns)
    expected = [
        [noise_ref(12345, 2, epoch, row, column) for column in range(5)]
        for epoch, row in ((0, 3), (7, 2**40))
    ]
    assert bits.tolist() == expected


def test_int_and_tensor_counters_give_the_same_bits():
    index = torch.arange(4)
    as_ints = noise_bits(1, 0, 9, index, 5)
    assert as_ints.tolist() == noise_bits(1, 0, torch.tensor(9), index, torch.tensor(5)).tolist()
    assert as_ints.tolist() == [noise_ref(1, 0, 9, i, 5) for i in range(4)]


def test_uniform_stays_inside_the_open_interval():
    extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    values = uniform(extremes)
    assert values.min() > 0
    assert values.max() < 1


def test_uniform_fills_buckets_evenly():
    values = uniform(noise_bits(0, 1, torch.arange(200).unsqueeze(1), torch.arange(500)))
    counts = torch.histc(values, 50, 0, 1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert 20 < chi_square < 95  # 49 degrees of freedom: mean 49, standard deviation 10


def test_streams_are_uncorrelated():
    counters = torch.arange(100_000)
    a, b = (uniform(noise_bits(0, stream, counters)) for stream in (1, 2))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4.5 / 100_000**0.5


def test_below_is_even_and_in_range():
    counts = torch.bincount(below(noise_bits(3, 0, torch.arange(70_000)), 7), minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000).abs() < 4.5 * 10_000**0.5).all()


def test_permutation_is_one_and_depends_on_seed_and_epoch():
    orders = {(seed, epoch): permutation(101, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert order.sort().values.tolist() == list(range(101))
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
