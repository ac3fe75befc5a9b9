import platform

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from fastdistil.models.taps import Wanted, accepted_inputs, fast_dtype, frozen_copy, tap_teacher


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="flags of x86 CPUs")
@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, None)],
)
def test_bfloat16_is_fast_only_with_its_instructions(monkeypatch, avx512_bf16, amx, expected):
    """AVX-512 alone emulates it, though oneDNN calls it supported there."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_dtype(torch.device("cpu")) == expected


def test_a_frozen_copy_computes_the_same_bits_from_fewer_bytes(tiny_model, tiny_batch):
    ids, mask = tiny_batch(tiny_model)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    frozen = frozen_copy(tiny_model, torch.bfloat16)
    wanted = Wanted(hidden=frozenset({0, 3}), embeddings=True)
    inputs = {"input_ids": ids, "attention_mask": mask.bool()}
    taps = [tap_teacher(model, inputs, torch.bfloat16, wanted) for model in (tiny_model, frozen)]
    assert torch.equal(taps[0].last_hidden, taps[1].last_hidden)
    assert torch.equal(taps[0].embeddings, taps[1].embeddings)
    assert all(torch.equal(taps[0].hidden[layer], taps[1].hidden[layer]) for layer in (0, 3))
    for own, copied in zip(*(t.vocabulary_operands() for t in taps), strict=True):
        assert torch.equal(own.to(copied.dtype), copied)
    linear = [m.weight for m in frozen.modules() if isinstance(m, torch.nn.Linear)]
    assert {weight.dtype for weight in linear} == {torch.bfloat16}
    # Embeddings keep their precision, and the model its weights.
    assert frozen.get_input_embeddings().weight.dtype == torch.float32
    after = tiny_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert frozen_copy(tiny_model, None) is tiny_model


def test_a_second_segment_is_not_shown_to_a_model_with_one_type():
    """RoBERTa's table of token types has one row, which a type of 1 would be beyond."""
    config = RobertaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, type_vocab_size=1,
    )  # fmt: skip
    model = RobertaModel(config).eval()
    ids = torch.full((1, 6), 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids > 0}
    assert set(accepted_inputs(model, inputs)) == {"input_ids", "attention_mask"}
    model(**accepted_inputs(model, inputs))
