"""What the data path must know of a tokenizer, fast encoding of documents, and a vocabulary of one's own."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastdistil.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertTokenizer, PreTrainedTokenizerBase

_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MAX_ALPHABET = 1000


@dataclass(frozen=True)
class TokenizerFacts:
    """The ids and tables that packing and masking need, free of the tokenizer itself.

    Attributes:
        vocab_size: V, one more than the largest token id.
        begin_id, end_id: what wraps a sequence: [CLS] and [SEP], or <s> and </s>.
        pad_id, mask_id: padding and the mask token.
        special_ids: every special token, sorted; none of them is ever picked for masking.
        continuation: (V,) bool, true where a token goes on with the word before it ("##ing"); None where the
            tokenizer's model does not tell.
        fingerprint: equal for two tokenizers exactly if they map every text to the same ids.
    """

    vocab_size: int
    begin_id: int
    end_id: int
    pad_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    continuation: np.ndarray | None
    fingerprint: str

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
        """Reads the facts. A UserError names the special token that is missing."""
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} is not a fast tokenizer: it needs a tokenizer.json"
            )
        ids = {
            "begin": tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id,
            "end": tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id,
            "padding": tokenizer.pad_token_id,
            "mask": tokenizer.mask_token_id,
        }
        missing = [name for name, token_id in ids.items() if token_id is None]
        if missing:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no {' and no '.join(missing)} token: "
                "it is not the tokenizer of a masked language model"
            )
        vocab = tokenizer.get_vocab()
        special_ids = tuple(sorted({*tokenizer.all_special_ids, *ids.values()}))
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        return cls(
            vocab_size=max(vocab.values()) + 1,
            begin_id=ids["begin"],
            end_id=ids["end"],
            pad_id=ids["padding"],
            mask_id=ids["mask"],
            special_ids=special_ids,
            continuation=_continuation(vocab, backend, special_ids),
            fingerprint=_fingerprint(backend, ids),
        )


def _continuation(
    vocab: dict[str, int], backend: dict[str, dict[str, str]], special_ids: tuple[int, ...]
) -> np.ndarray | None:
    """(V,) bool. WordPiece marks the pieces that continue a word, byte-level BPE those that begin one."""
    table = np.zeros(max(vocab.values()) + 1, dtype=bool)
    prefix = backend["model"].get("continuing_subword_prefix")
    if backend["model"].get("type") == "WordPiece" and prefix:
        table[[i for token, i in vocab.items() if token.startswith(prefix)]] = True
    elif any(token.startswith("Ġ") for token in vocab):
        # As in fairseq's RoBERTa: what follows without a space, punctuation too, belongs to the word. "Ċ"
        # is "\n".
        table[[i for token, i in vocab.items() if not token.startswith(("Ġ", "Ċ"))]] = True
    else:
        return None
    table[list(special_ids)] = False
    return table


def _fingerprint(backend: dict[str, dict[str, str]], ids: dict[str, int]) -> str:
    # Truncation, padding and the post-processor change no id of a document's text: saving and loading may
    # alter them.
    parts = {name: backend[name] for name in ("normalizer", "pre_tokenizer", "model")}
    added = sorted((token["id"], token["content"]) for token in backend["added_tokens"])  # type: ignore[index]
    text = json.dumps([parts, added, ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DocumentEncoder:
    """Token ids of documents, without special tokens, on all cores.

    A document that spells "[MASK]" is text: it is split into ordinary pieces and never becomes the mask
    token. The work is done by a copy of the tokenizer's backend, so that the caller's own keeps its
    truncation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def __call__(self, documents: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(documents, add_special_tokens=False)]


def train_wordpiece(documents: Iterable[str], vocab_size: int, *, max_length: int = 512) -> BertTokenizer:
    """Trains a lower-cased WordPiece vocabulary of at most `vocab_size` entries.

    The same documents give the same vocabulary. It takes seconds for a few megabytes.

    Args:
        documents: iterated twice, so not an iterator.
        vocab_size: V, with the special tokens; [PAD] is id 0.
        max_length: what the tokenizer truncates to when asked to.

    Raises:
        UserError: `vocab_size` is below 64, or the documents hold no text.
    """
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertTokenizer

    if vocab_size < 64:
        raise UserError(f"vocab_size must be >= 64, got {vocab_size}")
    backend = BertTokenizer().backend_tokenizer
    raw: Counter[str] = Counter()
    for document in documents:
        raw.update(document)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normalized in backend.normalizer.normalize_str(character).strip():
            counts[normalized] += count
    if not counts:
        raise UserError("no text to train a vocabulary on")
    size = min(_MAX_ALPHABET, (vocab_size - len(_SPECIAL_TOKENS)) // 4)
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:size])
    # The trainer numbers the pieces "##a" in the order of a randomly seeded hash map, and breaks ties
    # between merges by these numbers. Named here, they are numbered first; the tokenizer below does not
    # take them for special.
    continuations = [f"##{character}" for character in alphabet]
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_SPECIAL_TOKENS + continuations,
        initial_alphabet=alphabet,
        limit_alphabet=size,
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return BertTokenizer(vocab=backend.get_vocab(), model_max_length=max_length)
