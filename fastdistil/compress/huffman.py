"""Canonical Huffman coding of small whole numbers (Huffman 1952), vectorised over chunks.

The symbols are coded in chunks of `CHUNK`, one after the other without gaps; the length of each chunk in bits
is stored, so all chunks are decoded side by side, one symbol of each at a time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 512  # symbols; 16 bits for each chunk are 0.03 bits for each symbol
MAX_LENGTH = 16  # bits of a code, so that a code at any bit of a byte ends within three bytes
_PADDING = 3  # bytes read beyond the last code

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Coded:
    stream: Bytes  # the codes, highest bit first
    lengths: Bytes  # (K,) bits of each symbol's code; 0: it does not occur
    chunks: NDArray[np.int16]  # bits of each chunk


def code_lengths(counts: NDArray[np.int64]) -> Bytes:
    """Bits of each symbol's code in an optimal prefix code of at most `MAX_LENGTH` bits; 0: no such symbol.

    By package-merge (Larmore and Hirschberg 1990); without the limit it gives as short a code as Huffman's.
    """
    symbols = np.flatnonzero(counts)
    if len(symbols) == 1:
        return (counts > 0).astype(np.uint8)
    leaves = [(int(counts[s]), np.eye(len(symbols), dtype=np.int64)[i]) for i, s in enumerate(symbols)]
    leaves.sort(key=lambda leaf: leaf[0])
    merged = leaves
    for _ in range(MAX_LENGTH - 1):
        pairs = zip(merged[::2], merged[1::2], strict=False)
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
        merged = sorted([*leaves, *packages], key=lambda package: package[0])
    lengths = np.zeros(len(counts), np.uint8)
    lengths[symbols] = sum(package[1] for package in merged[: 2 * len(symbols) - 2])
    return lengths


def encode(symbols: Bytes, size: int) -> Coded:
    """Codes `symbols`, at least one and each below `size`, which is at most 256."""
    lengths = code_lengths(np.bincount(symbols, minlength=size))
    bits = lengths[symbols].astype(np.int64)
    ends = np.cumsum(bits)
    chunk_ends = np.append(ends[CHUNK - 1 :: CHUNK], ends[-1:] if len(symbols) % CHUNK else [])
    # Each code is shifted to its place in a pair of 32-bit words. The codes of a word have no bit in common,
    # so their sum is their union, and float64 adds it exactly.
    starts = ends - bits
    word = starts >> 5
    placed = _codes(lengths)[symbols] << (64 - (starts & 31) - bits).astype(np.uint64)
    count = int(word[-1]) + 2
    high = np.bincount(word, (placed >> np.uint64(32)).astype(np.float64), count)
    low = np.bincount(word + 1, (placed & np.uint64(0xFFFFFFFF)).astype(np.float64), count)
    stream = (high + low).astype(np.uint32).astype(">u4").view(np.uint8)
    needed = -(-int(ends[-1]) // 8)
    stream = np.concatenate([stream[:needed], np.zeros(_PADDING, np.uint8)])
    return Coded(stream, lengths, np.diff(chunk_ends, prepend=0).astype(np.int16))


def decode(coded: Coded, count: int) -> Bytes:
    """The `count` symbols."""
    longest = int(coded.lengths.max())
    table = _table(coded.lengths, longest)
    stream = coded.stream.astype(np.uint32)
    windows = stream[:-2] << 16 | stream[1:-1] << 8 | stream[2:]  # 24 bits from each byte on
    bits = coded.chunks.astype(np.int64)
    position = np.cumsum(bits) - bits
    symbols = np.empty((CHUNK, len(bits)), np.uint8)
    last = count - CHUNK * (len(bits) - 1)  # symbols of the last chunk
    for i in range(min(CHUNK, count)):
        if i == last:
            position = position[:-1]
        shift = (24 - longest - (position & 7)).astype(np.uint32)
        entry = table[(windows[position >> 3] >> shift) & ((1 << longest) - 1)]
        symbols[i, : len(position)] = entry >> 8
        position = position + (entry & 0xFF)
    return symbols.T.reshape(-1)[:count]


def _codes(lengths: Bytes) -> NDArray[np.uint64]:
    """The canonical code of each symbol: shorter ones first, those of one length in the symbols' order."""
    codes = np.zeros(len(lengths), np.uint64)
    code, previous = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            code <<= length - previous
            codes[symbol] = code
            code, previous = code + 1, length
    return codes


def _table(lengths: Bytes, longest: int) -> NDArray[np.int32]:
    """For each `longest` bits, symbol · 256 + length of the code that they begin with."""
    table = np.zeros(1 << longest, np.int32)
    codes = _codes(lengths)
    for symbol in np.flatnonzero(lengths):
        spare = longest - int(lengths[symbol])
        start = int(codes[symbol]) << spare
        table[start : start + (1 << spare)] = int(symbol) << 8 | int(lengths[symbol])
    return table
