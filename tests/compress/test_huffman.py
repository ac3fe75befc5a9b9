import heapq

import numpy as np
import pytest

from fastdistil.compress import huffman
from fastdistil.compress.huffman import CHUNK, MAX_LENGTH, code_lengths


def entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum())


def huffman_cost(counts: list[int]) -> int:
    """Bits of an optimal prefix code without a limit: the sum of all merges of the two smallest."""
    heap, cost = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


# One symbol; within a chunk; a whole chunk and one symbol more or less; many chunks and a short one.
@pytest.mark.parametrize("count", [1, 2, 100, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK, 40 * CHUNK + 77])
# A single symbol (size 1), one bit, 4 bits, all values of a byte.
@pytest.mark.parametrize("size", [1, 2, 16, 256])
def test_decoding_gives_what_was_coded(count: int, size: int) -> None:
    rng = np.random.default_rng(count)
    symbols = np.minimum(rng.exponential(size / 8, count), size - 1).astype(np.uint8)
    assert np.array_equal(huffman.decode(huffman.encode(symbols, size), count), symbols)


def test_symbols_that_do_not_occur_have_no_code() -> None:
    symbols = np.array([3, 3, 9, 3], np.uint8)
    coded = huffman.encode(symbols, 16)
    assert coded.lengths.nonzero()[0].tolist() == [3, 9]
    assert np.array_equal(huffman.decode(coded, 4), symbols)


def test_frequent_symbols_get_the_lengths_of_the_textbook() -> None:
    assert code_lengths(np.array([8, 4, 2, 1, 0, 1])).tolist() == [1, 2, 3, 4, 0, 4]


def test_the_code_costs_as_much_as_huffmans() -> None:
    counts = np.random.default_rng(0).integers(1, 5000, 200)
    assert int(code_lengths(counts) @ counts) == huffman_cost(counts.tolist())


def test_lengths_stop_at_the_limit() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:  # Huffman's code of these would have 29 bits
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = code_lengths(np.array(fibonacci)).astype(float)
    assert lengths.max() == MAX_LENGTH
    assert (2**-lengths).sum() == 1  # Kraft: no code word is left over


def test_the_longest_codes_decode() -> None:
    counts = 2 ** np.arange(18)
    symbols = np.random.default_rng(1).permutation(np.repeat(np.arange(18, dtype=np.uint8), counts))
    coded = huffman.encode(symbols, 18)
    assert coded.lengths.max() == MAX_LENGTH
    assert np.array_equal(huffman.decode(coded, len(symbols)), symbols)


@pytest.mark.parametrize("size", [2, 16, 256])
def test_the_stream_is_within_one_bit_a_symbol_of_the_entropy(size: int) -> None:
    values = np.random.default_rng(2).standard_normal(20_000)
    symbols = np.clip(values * size / 6 + size / 2, 0, size - 1).astype(np.uint8)
    coded = huffman.encode(symbols, size)
    bound = len(symbols) * (entropy(symbols) + 1) / 8
    assert len(coded.stream) <= bound + 4
    assert int(coded.chunks.sum()) == int(coded.lengths[symbols].sum())
