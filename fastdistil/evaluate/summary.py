"""Everything `fastdistil evaluate` tells of one masked language model: quality on text, and cost."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastdistil.data.corpus import open_corpus
from fastdistil.data.token_store import cached_token_store, open_token_store
from fastdistil.data.tokenizer import TokenizerFacts
from fastdistil.errors import UserError
from fastdistil.evaluate.cost import (
    BATCH_SIZES,
    LENGTH,
    Latency,
    bytes_on_disk,
    count_parameters,
    measure_latency,
    measure_peak_memory,
)
from fastdistil.evaluate.masked_lm import MaskedLMScore, evaluate_masked_lm
from fastdistil.models.load import load_masked_lm, max_positions


@dataclass(frozen=True)
class Summary:
    """Quality is None where no corpus was given. Cost is that of the encoder, by device."""

    source: str
    parameters: int
    disk_bytes: int
    score: MaskedLMScore | None
    sequences: int  # that the score was taken on
    latency: dict[str, list[Latency]]
    peak_bytes: dict[str, int]  # at the largest of the batch sizes

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, with its unit."""
        rows = [
            ("model", self.source),
            ("parameters", f"{self.parameters / 1e6:.2f} M"),
            ("size on disk", f"{self.disk_bytes / 1e6:.1f} MB"),
        ]
        if self.score is None:
            rows.append(("quality", "not measured: give --corpus"))
        else:
            rows += [
                ("held-out text", f"{self.score.tokens:,} masked tokens of {self.sequences:,} sequences"),
                ("loss", f"{self.score.loss:.4f} nats a token"),
                ("accuracy", f"{self.score.accuracy:.2%}"),
                ("perplexity", f"{self.score.perplexity:.2f}"),
            ]
        for device, latencies in self.latency.items():
            rows += [
                (
                    f"latency, {device}",
                    f"p50 {latency.p50_ms:.2f} ms, p95 {latency.p95_ms:.2f} ms at {latency.batch_size} × "
                    f"{latency.length} tokens" + (f", {latency.threads} threads" if device == "cpu" else ""),
                )
                for latency in latencies
            ]
            shape = f"{latencies[-1].batch_size} × {latencies[-1].length}"
            rows.append(
                (f"peak memory, {device}", f"{self.peak_bytes[device] / 1e6:.1f} MB at {shape} tokens")
            )
        return rows


def summarize(
    source: str,
    corpus: str | None,
    *,
    max_length: int | None = None,
    max_sequences: int = 2000,
    text_column: str = "text",
    split: str = "test",
) -> Summary:
    """Measure the model of a `transformers` folder or of the hub.

    Args:
        corpus: held-out text as `open_corpus` takes it, or a prepared token store; None: cost alone.
        max_length: tokens a sequence, of the score; None: 128, or what the model has positions for.
        max_sequences: the score is taken on the corpus's first so many.
        text_column, split: as of `open_corpus`.

    Raises:
        UserError: model or corpus cannot be read, or do not fit each other.
    """
    model, tokenizer = load_masked_lm(source)
    positions = max_positions(model)
    length = max_length or min(LENGTH, positions)
    if length > positions:
        raise UserError(f"max_length is {length}, but {source} has only {positions} positions")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

    score, sequences = None, 0
    if corpus is not None:
        if (Path(corpus) / "meta.json").is_file():
            store = open_token_store(corpus, tokenizer, max_length=length)
        else:
            text = open_corpus(corpus, text_column=text_column, split=split)
            store = cached_token_store(text, tokenizer, max_length=length, max_sequences=max_sequences)
        sequences = min(len(store), max_sequences)
        facts = TokenizerFacts.from_tokenizer(tokenizer)
        score = evaluate_masked_lm(model.to(devices[-1]), facts, store, np.arange(sequences))

    folder = _folder(source)
    cost_length = min(LENGTH, positions)
    latency, peak = {}, {}
    for device in devices:
        latency[device] = measure_latency({source: model.to(device)}, length=cost_length)[source]
        peak[device] = measure_peak_memory(
            folder, batch_size=max(BATCH_SIZES), length=cost_length, device=device
        )
    return Summary(source, count_parameters(model), bytes_on_disk(folder), score, sequences, latency, peak)


def _folder(source: str) -> Path:
    """Where the files of a model lie; one of the hub was downloaded when it was loaded."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, local_files_only=True))
