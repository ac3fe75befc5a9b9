"""Load a masked language model, or an encoder alone, and its tokenizer.

From a `transformers` folder or from the Hugging Face hub.

Only safetensors weights are read and no remote code is run. What is wrong with a folder is said in one line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.models.heads import mlm_head


def load_masked_lm(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a trained masked language model, in eval mode.

    Args:
        source: a `transformers` folder, or a model name on the hub.
        dtype: of the loaded weights, whatever the file has.

    Raises:
        UserError: the folder does not exist or is not a model folder, has no safetensors weights, no trained
            masked-language-model head (the message names the head and the recipe that grows one), or no
            tokenizer with a mask token that fits the model; the hub cannot be reached; the head's family is
            not supported.
    """
    model, missing = _load_masked_lm(source, dtype)
    head = _head_keys(model, missing)
    if head:
        raise UserError(
            f"{source}: no trained masked-language-model head ({_common_prefix(head)!r} of "
            f"{type(model).__name__} is missing); grow one first: fastdistil train mlm --teacher {source}"
        )
    return model, _load_tokenizer(source, model)


def load_encoder_with_new_head(
    source: str | Path, dtype: torch.dtype = torch.float32, token_counts: Tensor | None = None
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of an encoder, with a fresh head where its folder has none, in eval mode.

    The decoder is the word embeddings (tied) where the model's config says so, the transform starts as
    `transformers` initialises a head of that family (from torch's global random state), and the output bias
    starts at the log frequency of each token if `token_counts` (V,) is given (with one added to each
    count), which a few thousand steps would otherwise be spent on; else at zero. A head that the folder has
    is kept as it is.

    Raises `UserError` as `load_masked_lm` does, except for a missing head.
    """
    model, missing = _load_masked_lm(source, dtype)
    bias = mlm_head(model).bias
    if _head_keys(model, missing) and token_counts is not None and bias is not None:
        frequency = (token_counts + 1.0) / (token_counts + 1.0).sum()
        with torch.no_grad():
            bias.copy_(frequency.log())
    return model, _load_tokenizer(source, model)


def load_encoder(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)` of an encoder, in eval mode; a head and a pooler that its folder has are left out.

    Raises `UserError` as `load_masked_lm` does, except for a missing head.
    """
    from transformers import AutoModel

    model, missing = _load_model(source, dtype, AutoModel, "an encoder")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    _check_encoder(source, model, {key for key in missing if not key.startswith("pooler.")})
    return model, _load_tokenizer(source, model)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a `transformers` folder or of a hub model; `UserError` if it has no mask token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer could be loaded ({_first_line(error)})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # What transformers makes up, from the model type alone, for a folder without tokenizer files.
        raise UserError(f"{source}: has no tokenizer")
    if tokenizer.mask_token_id is None:
        raise UserError(f"{source}: its tokenizer has no mask token, which masked language modelling needs")
    return tokenizer


def max_positions(model: Any) -> int:
    """The longest sequence, in tokens, that the model's positions allow."""
    positions = model.config.max_position_embeddings
    # RoBERTa counts its positions from behind the padding id.
    return positions - model.config.pad_token_id - 1 if model.config.model_type == "roberta" else positions


def _load_masked_lm(source: str | Path, dtype: torch.dtype) -> tuple[Any, set[str]]:
    from transformers import AutoModelForMaskedLM

    model, missing = _load_model(source, dtype, AutoModelForMaskedLM, "a masked language model")
    mlm_head(model)
    _check_encoder(source, model, missing - set(_head_keys(model, missing)))
    return model, missing


def _load_model(source: str | Path, dtype: torch.dtype, auto: Any, kind: str) -> tuple[Any, set[str]]:
    """The model in eval mode, and the names of the weights that its folder lacks."""
    from safetensors import SafetensorError

    _check_folder(source)
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                str(source),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: {_why(source, error, kind)}") from error
    return model.eval(), set(info["missing_keys"])


def _check_encoder(source: str | Path, model: Any, missing: set[str]) -> None:
    if missing:
        raise UserError(
            f"{source}: the weights do not fit {type(model).__name__}: {len(missing)} encoder weights are "
            f"missing, the first is {min(missing)!r}"
        )


def _load_tokenizer(source: str | Path, model: Any) -> Any:
    tokenizer = load_tokenizer(source)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens but the model's vocabulary only "
            f"{model.config.vocab_size}"
        )
    return tokenizer


def _check_folder(source: str | Path) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{source}: not a model folder, it has no config.json")
    # A hub name is "name" or "owner/name"; anything else can only have been meant as a path.
    elif isinstance(source, Path) or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder")


def _why(source: str | Path, error: Exception, kind: str) -> str:
    if not Path(source).is_dir():
        return f"neither a folder here nor a model that the hub gives us ({_first_line(error)})"
    if not any(Path(source).glob("*.safetensors*")):
        return "the folder has no safetensors weights (other formats are not read)"
    return f"cannot be loaded as {kind} ({_first_line(error)})"


def _head_keys(model: Any, keys: set[str]) -> list[str]:
    return sorted(key for key in keys if not key.startswith(model.base_model_prefix + "."))


def _common_prefix(keys: list[str]) -> str:
    parts = [key.split(".") for key in keys]
    depth = min(len(part) for part in parts)
    shared = next((i for i in range(depth) if len({part[i] for part in parts}) > 1), depth)
    return ".".join(parts[0][:shared]) or ", ".join(keys)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar and the report on missing weights of `transformers`: we say it ourselves."""
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
