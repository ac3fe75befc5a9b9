"""Forward and backward of a student that trains without dropout in attention: 12 layers, 384 wide.

Without dropout SDPA takes torch's flash attention, on a CPU too, and there its backward pass in bfloat16 is
slower than in float32, the more so the shorter the sequences are. fastdistil's pass gives it float32 queries,
keys and values (models/attention.py); the rival is the same model under the same autocast. On a GPU both are
the same.
ModernBERT has no dropout in attention, and recipes have none where `student.dropout` is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_train import autocast
from harness import Variant, Work, cases, compare, device
from records import OURS, VOCAB
from transformers import BertConfig, BertModel

from fastdistil.models.taps import tap
from fastdistil.ops.matmul import native_bf16_products


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    layers: int = 12
    dim: int = 384
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}-{self.dtype}"


CASES = [Case(32, 56), Case(16, 128), Case(4, 512)]
QUICK = [Case(2, 16, layers=2, dim=48)]


def build(case: Case) -> Work:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=case.dim,
        num_hidden_layers=case.layers,
        num_attention_heads=case.dim // 32,
        intermediate_size=4 * case.dim,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = BertModel(config, add_pooling_layer=False)
    model.to(device()).train()
    # Softmax does not see a key's bias: its gradient is rounding errors, which cannot be compared.
    parameters = [p for name, p in model.named_parameters() if not name.endswith("key.bias")]
    ids = torch.randint(VOCAB, (case.batch, case.length), device=device())
    mask = torch.ones_like(ids)
    mask[: case.batch // 2, -case.length // 8 :] = 0  # a batch has padding as a rule
    inputs = {"input_ids": ids, "attention_mask": mask}
    upstream = torch.randn(case.batch, case.length, case.dim, device=device())

    def step(hidden: Callable[[], torch.Tensor]) -> Variant:
        def run() -> tuple[torch.Tensor, ...]:
            with autocast(torch.bfloat16):
                states = hidden()
            return torch.autograd.grad(states, parameters, upstream.to(states.dtype))

        return run

    return Work(
        variants={
            "SDPA as it is": step(lambda: model(**inputs).last_hidden_state),
            OURS: step(lambda: tap(model, inputs).last_hidden),
        },
        tokens=case.batch * case.length,
        launch_ahead=False,
    )


@pytest.mark.skipif(not native_bf16_products(device()), reason="bfloat16 products are emulated here")
@pytest.mark.parametrize("case", cases(CASES, QUICK), ids=str)
def test_train_no_dropout(benchmark: Any, case: Case) -> None:
    compare(benchmark, "train_no_dropout", case, build)
