"""The order of the data: which sequences each optimiser step, rank and micro-batch reads.

Training reads the endless line of samples

    permutation of epoch 0, permutation of epoch 1, permutation of epoch 2, ...

and optimiser step i takes samples [i G, (i + 1) G), G the batch size over all ranks and micro-batches. Rank
r of W takes the r-th of W consecutive blocks of them, micro-batch by micro-batch. So one process, one
process with accumulation and several processes read the same sequences in the same step, the step's number
says where the data stands, and a corpus smaller than one batch needs no rule of its own. No sequence is
left out of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdistil.data.noise import permutation
from fastdistil.data.token_store import TokenStore
from fastdistil.errors import UserError

_T = TypeVar("_T", bound=Any)


@dataclass(frozen=True)
class TokenBatch:
    """Unmasked sequences. B sequences of L tokens.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) bool, false on padding.
        sequence_index: (B,) int64, which sequence each row is; with `epoch` it seeds the row's masking.
        epoch: (B,) int64, the pass over the data that each row belongs to.
        token_type_ids: (B, L) int64, 0 in the first segment and 1 in the second; None: one segment.
        next_sentence: (B,) int64, 0 where the second segment follows the first, 1 where it is a random one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence_index: Tensor
    epoch: Tensor
    token_type_ids: Tensor | None = None
    next_sentence: Tensor | None = None

    def to(self, device: torch.device | str) -> TokenBatch:
        return to_device(self, device)


class Batch(Protocol):
    """What the training loop hands to the models and the objectives."""

    @property
    def input_ids(self) -> Tensor:
        """(B, L) int64."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, L) bool, false on padding."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the models' forward passes are called with."""


class BatchSource(Protocol):
    """What the training loop reads from."""

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of optimiser step `step`, on the device."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; taken after step i it lets `load_state_dict` go on with step i + 1."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TokenSource(Protocol):
    """A `BatchSource` of sequences as they are, on the CPU, which `data.masking.MaskedBatches` masks."""

    def micro_batches(self, step: int) -> Iterator[TokenBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def to_device(batch: _T, device: torch.device | str) -> _T:
    """The batch, a dataclass of tensors, such dataclasses and other values, with its tensors on `device`."""
    cuda = torch.device(device).type == "cuda"
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            # Pinned memory lets the copy overlap the work that the device still has.
            moved[field.name] = value.pin_memory().to(device, non_blocking=True) if cuda else value.to(device)
        elif is_dataclass(value):
            moved[field.name] = to_device(value, device)
    return replace(batch, **moved)


@dataclass(frozen=True)
class Share:
    """How one optimiser step's samples are dealt to ranks and micro-batches.

    `batch_size` is over all ranks and micro-batches, and must be a multiple of micro_batch_size *
    world_size; a `micro_batch_size` of None makes one micro-batch a rank.
    """

    batch_size: int
    micro_batch_size: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {self.batch_size}")
        micro = 1 if self.micro_batch_size is None else self.micro_batch_size
        if micro < 1 or self.batch_size % (micro * self.world_size):
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro} x "
                f"{self.world_size} processes"
            )

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """The numbers of this rank's samples of the step, one int64 array a micro-batch."""
        per_rank = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * per_rank
        samples = np.arange(start, start + per_rank)
        return np.split(samples, per_rank // (self.micro_batch_size or per_rank))


class StoreBatches:
    """Batches of the sequences `indices` of a store, in the module's order.

    Args:
        store: the tokens.
        indices: sorted sequence numbers, as `TokenStore.split` gives them.
        share: batch size, micro-batch size, rank and world size.
        seed: of the run.
    """

    def __init__(self, store: TokenStore, indices: np.ndarray, share: Share, seed: int) -> None:
        if len(indices) == 0:
            raise UserError(f"corpus {store.meta.corpus!r} has no sequence to train on")
        self._store = store
        self._indices = indices
        self._share = share
        self._seed = seed
        self._order: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> float:
        return len(self._indices) / self._share.batch_size

    def micro_batches(self, step: int) -> Iterator[TokenBatch]:
        for samples in self._share.micro_batches(step):
            epochs, places = np.divmod(samples, len(self._indices))
            rows = np.array([self._permutation(e)[p] for e, p in zip(epochs.tolist(), places, strict=True)])
            yield read_batch(self._store, self._indices[rows], epochs)

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on besides the step: a resumed run must have the same."""
        return {
            "sequences": len(self._indices),
            "sha256": self._store.meta.sha256["input_ids.bin"],
            "batch_size": self._share.batch_size,
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError naming what differs from the run that saved the state."""
        require_same_data(state, self.state_dict())

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._order:
            # Only the newest is kept, and the one before it, since a step may span two.
            self._order = {e: order for e, order in self._order.items() if e == epoch - 1}
            self._order[epoch] = permutation(len(self._indices), self._seed, epoch).numpy()
        return self._order[epoch]


def require_same_data(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """A UserError naming the first entry of `present` that the saved state has otherwise."""
    for name, value in present.items():
        if saved.get(name) != value:
            raise UserError(
                f"cannot resume: {name} is {value}, the checkpoint was made with {saved.get(name)}"
            )


def read_batch(store: TokenStore, rows: np.ndarray, epochs: np.ndarray | None = None) -> TokenBatch:
    """The sequences `rows` (B,) of a store; `epochs` (B,) defaults to 0."""
    ids = torch.from_numpy(store.input_ids[rows].astype(np.int64))
    position = torch.arange(ids.shape[1])
    attention_mask = position < torch.from_numpy(store.lengths[rows]).unsqueeze(1)
    token_type_ids = next_sentence = None
    if store.pairs is not None:
        pairs = store.pairs[rows]
        second = position >= torch.from_numpy(pairs["first_length"].astype(np.int64)).unsqueeze(1)
        token_type_ids = (second & attention_mask).long()
        next_sentence = torch.from_numpy(pairs["next_sentence"].astype(np.int64))
    return TokenBatch(
        input_ids=ids,
        attention_mask=attention_mask,
        sequence_index=torch.from_numpy(rows),
        epoch=torch.from_numpy(epochs) if epochs is not None else torch.zeros(len(rows), dtype=torch.int64),
        token_type_ids=token_type_ids,
        next_sentence=next_sentence,
    )


def evaluation_batches(
    store: TokenStore, indices: np.ndarray, batch_size: int, max_batches: int | None = None
) -> Iterator[TokenBatch]:
    """The sequences `indices` in order, the last batch possibly smaller, all of epoch 0."""
    for number, start in enumerate(range(0, len(indices), batch_size)):
        if number == max_batches:
            return
        yield read_batch(store, indices[start : start + batch_size])
