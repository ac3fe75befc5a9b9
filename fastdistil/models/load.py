"""Load a masked language model, or an encoder alone, and its tokenizer.

From a `transformers` folder or from the Hugging Face hub.

Only safetensors weights are read and no remote code is run. What is wrong with a folder is said in one line.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.models.heads import mlm_head, next_sentence_head, start_at_frequencies

_NEXT_SENTENCE = "cls.seq_relationship."  # where a model keeps its `next_sentence_head`


def load_masked_lm(
    source: str | Path, dtype: torch.dtype = torch.float32, *, next_sentence: bool = False
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a trained masked language model, in eval mode.

    Args:
        source: a `transformers` folder, or a model name on the hub.
        dtype: of the loaded weights, whatever the file has.
        next_sentence: whether a next-sentence head that the folder has is kept, with the pooler that it
            reads, so that the model is a `BertForPreTraining`; else both are left out.

    Raises:
        UserError: the folder does not exist or is not a model folder, has no safetensors weights, no trained
            masked-language-model head (the message names the head and the recipe that grows one), or no
            tokenizer with a mask token that fits the model; the hub cannot be reached; the head's family is
            not supported.
    """
    model, info = _load_masked_lm(source, dtype)
    head = head_keys(model, info["missing_keys"])
    if head:
        raise UserError(
            f"{source}: no trained masked-language-model head ({common_prefix(head)!r} of "
            f"{type(model).__name__} is missing); grow one first: fastdistil train mlm --teacher {source}"
        )
    if next_sentence and any(key.startswith(_NEXT_SENTENCE) for key in info["unexpected_keys"]):
        model, info = _load_masked_lm(source, dtype, next_sentence=True)
        check_encoder(source, model, info["missing_keys"])  # not even a pooler
    return model, load_fitting_tokenizer(source, model)


def load_encoder_with_new_head(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    token_counts: Tensor | None = None,
    *,
    next_sentence: bool = False,
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of an encoder, with a fresh head where its folder has none, in eval mode.

    The decoder is the word embeddings (tied) where the model's config says so, the transform starts as
    `transformers` initialises a head of that family (from torch's global random state), and the output bias
    as `start_at_frequencies` has it if `token_counts` is given; else at zero. A head that the folder has is
    kept as it is.

    With `next_sentence` the model is a `BertForPreTraining`, which also has a head for the next sentence and
    the pooler that it reads; each of them, too, is fresh where the folder has none.

    Raises `UserError` as `load_masked_lm` does, except for a missing head; and, for `next_sentence`, if the
    family has no head for it.
    """
    model, info = _load_masked_lm(source, dtype, next_sentence=next_sentence)
    fresh = any(not key.startswith(_NEXT_SENTENCE) for key in head_keys(model, info["missing_keys"]))
    if fresh and token_counts is not None:
        start_at_frequencies(mlm_head(model), token_counts)
    return model, load_fitting_tokenizer(source, model)


def load_encoder(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)` of an encoder, in eval mode; a head and a pooler that its folder has are left out.

    Raises `UserError` as `load_masked_lm` does, except for a missing head.
    """
    from transformers import AutoModel

    model, info = load_model(source, dtype, AutoModel, "an encoder")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    check_encoder(source, model, {key for key in info["missing_keys"] if not key.startswith("pooler.")})
    return model, load_fitting_tokenizer(source, model)


def load_tokenizer(source: str | Path, *, masks: bool = True) -> Any:
    """The tokenizer of a `transformers` folder or of a hub model.

    Raises `UserError` if there is none, and if it has no mask token where it `masks`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_expanded(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer could be loaded ({_first_line(error)})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # What transformers makes up, from the model type alone, for a folder without tokenizer files.
        raise UserError(f"{source}: has no tokenizer")
    if masks and tokenizer.mask_token_id is None:
        raise UserError(f"{source}: its tokenizer has no mask token, which masked language modelling needs")
    return tokenizer


# Families that count their positions from behind the padding id.
_BEHIND_PADDING = ("camembert", "ibert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")


def max_positions(model: Any) -> int:
    """The longest sequence, in tokens, that the model's positions allow.

    Raises `UserError` for a family without a number of positions, such as T5.
    """
    config = model.config
    positions: int = getattr(config, "max_position_embeddings", 0)
    if positions < 1:
        raise UserError(f"{type(model).__name__}: its config names no max_position_embeddings")
    return positions - config.pad_token_id - 1 if config.model_type in _BEHIND_PADDING else positions


def load_model_config(source: str | Path, kind: str) -> Any:
    """The config of a `transformers` folder or of a hub model, without its weights.

    `kind` is what the folder should hold, for the message. Raises `UserError` if there is none.
    """
    from transformers import AutoConfig

    import fastdistil.models.bilstm  # noqa: F401  registers it with the Auto classes

    _check_folder(source)
    try:
        return AutoConfig.from_pretrained(_expanded(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {_why(source, error, kind)}") from error


def read_depth(source: str | Path) -> int:
    """The number of layers that a model's config names, 0 where it names none.

    Raises as `load_model_config`.
    """
    depth: int = getattr(load_model_config(source, "a model"), "num_hidden_layers", 0)
    return depth


def _expanded(source: str | Path) -> str:
    """A folder may be given from the home folder on: in YAML or behind `--set` no shell expands it."""
    return str(Path(source).expanduser()) if str(source).startswith("~") else str(source)


def load_model(
    source: str | Path, dtype: torch.dtype, auto: Any, kind: str, **keywords: Any
) -> tuple[Any, dict[str, Any]]:
    """The model in eval mode, and what `transformers` says of its weights (missing and mismatched keys).

    `kind` is what the folder should hold, for the message. The `keywords` go to `auto.from_pretrained`.
    """
    from safetensors import SafetensorError

    import fastdistil.models.bilstm  # noqa: F401  registers it with the Auto classes
    from fastdistil.compress.store import is_compressed

    _check_folder(source)
    if is_compressed(source):
        raise UserError(f"{source}: a compressed model cannot be loaded as {kind}; fastdistil.load reads it")
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(
                _expanded(source),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **keywords,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: {_why(source, error, kind)}") from error
    return model.eval(), info


def check_encoder(source: str | Path, model: Any, missing: Collection[str]) -> None:
    """Raise `UserError` if weights of the encoder, whose names are `missing`, are not in the folder."""
    if missing:
        raise UserError(
            f"{source}: the weights do not fit {type(model).__name__}: {len(missing)} encoder weights are "
            f"missing, the first is {min(missing)!r}"
        )


def head_keys(model: Any, keys: Collection[str]) -> list[str]:
    """Those of the `keys` that lie outside of the model's encoder."""
    return sorted(key for key in keys if not key.startswith(model.base_model_prefix + "."))


def common_prefix(keys: Sequence[str]) -> str:
    """The dotted name that all `keys` start with, to name a head by; without one, all of them."""
    parts = [key.split(".") for key in keys]
    depth = min(len(part) for part in parts)
    shared = next((i for i in range(depth) if len({part[i] for part in parts}) > 1), depth)
    return ".".join(parts[0][:shared]) or ", ".join(keys)


def load_fitting_tokenizer(source: str | Path, model: Any, *, masks: bool = True) -> Any:
    """`load_tokenizer`, with a `UserError` if the model's vocabulary is smaller."""
    tokenizer = load_tokenizer(source, masks=masks)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens but the model's vocabulary only "
            f"{model.config.vocab_size}"
        )
    return tokenizer


def _load_masked_lm(
    source: str | Path, dtype: torch.dtype, next_sentence: bool = False
) -> tuple[Any, dict[str, Any]]:
    """As `load_model`; of the encoder nothing but a pooler may be missing."""
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

    kind = "a model with a next-sentence head" if next_sentence else "a masked language model"
    auto = AutoModelForPreTraining if next_sentence else AutoModelForMaskedLM
    model, info = load_model(source, dtype, auto, kind)
    if next_sentence and next_sentence_head(model) is None:
        raise UserError(f"{source}: {type(model).__name__} is not {kind}; BERT and MobileBERT have one")
    mlm_head(model)
    pooler = f"{model.base_model_prefix}.pooler."
    missing = {key for key in info["missing_keys"] if not key.startswith(pooler)}
    check_encoder(source, model, missing - set(head_keys(model, missing)))
    return model, info


def _check_folder(source: str | Path) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{source}: not a model folder, it has no config.json")
    # A hub name is "name" or "owner/name"; anything else can only have been meant as a path.
    elif isinstance(source, Path) or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder")


def _why(source: str | Path, error: Exception, kind: str) -> str:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return f"neither a folder here nor a model that the hub gives us ({_first_line(error)})"
    if not any(folder.glob("*.safetensors*")):
        return "the folder has no safetensors weights (other formats are not read)"
    return f"cannot be loaded as {kind} ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and the report on missing weights of `transformers`: we say it ourselves."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
