import copy
import io

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from fastdistil.compress.factorize_embeddings import (
    METHODS,
    FactorizedEmbedding,
    FactorizeEmbeddingsOptions,
    factorize_embedding,
)
from fastdistil.compress.method import Calibration
from fastdistil.compress.replacements import replacements
from fastdistil.data.task_batches import TaskBatch
from fastdistil.errors import UserError

(METHOD,) = METHODS
PATHS = {
    "bert": "bert.embeddings.word_embeddings",
    "roberta": "roberta.embeddings.word_embeddings",
    "distilbert": "distilbert.embeddings.word_embeddings",
    "electra": "electra.embeddings.word_embeddings",
    "modernbert": "model.embeddings.tok_embeddings",
}


def _apply(model, calibration=None, **options):
    return METHOD.finish(
        METHOD.apply(model, FactorizeEmbeddingsOptions(**options), calibration),
        FactorizeEmbeddingsOptions(**options),
    )


def _embedding(rows=30, width=12):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=1)


def _counts(rows=30):
    return 1000.0 / torch.arange(1, rows + 1, dtype=torch.float64)  # Zipf


def _weighted_error(embedding, factors, counts):
    return (counts * ((embedding.weight - factors.weight) ** 2).sum(1)).sum()


def test_at_full_rank_the_embeddings_are_the_same():
    embedding = _embedding()
    factors = factorize_embedding(embedding, 12, _counts())
    ids = torch.tensor([[3, 29, 1], [0, 3, 7]])
    torch.testing.assert_close(factors(ids), embedding(ids))
    torch.testing.assert_close(factors.weight, embedding.weight)


def test_with_equal_counts_the_error_is_the_tail_of_the_singular_values():
    embedding = _embedding()
    factors = factorize_embedding(embedding, 5, torch.ones(30, dtype=torch.float64))
    tail = torch.linalg.svdvals(embedding.weight)[5:]
    torch.testing.assert_close((embedding.weight - factors.weight).norm(), tail.norm())


def test_the_weighted_error_is_the_tail_of_the_weighted_matrix():
    embedding, counts = _embedding(), _counts()
    tail = torch.linalg.svdvals(counts.sqrt()[:, None] * embedding.weight)[5:]
    error = _weighted_error(embedding, factorize_embedding(embedding, 5, counts), counts)
    torch.testing.assert_close(error, (tail**2).sum())


def test_counts_make_frequent_words_nearer():
    embedding, counts = _embedding(), _counts()
    plain = factorize_embedding(embedding, 5, torch.ones_like(counts))
    weighted = factorize_embedding(embedding, 5, counts)
    error = _weighted_error(embedding, weighted, counts)
    assert error < 0.7 * _weighted_error(embedding, plain, counts)


def test_padding_keeps_its_place_and_gets_no_gradient_in_the_table():
    factors = factorize_embedding(_embedding(), 5, _counts())
    factors(torch.tensor([1, 2])).sum().backward()
    assert factors.padding_idx == 1
    assert factors.table.weight.grad[1].abs().sum() == 0
    assert factors.table.weight.grad[2].abs().sum() > 0


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_counted_are_the_tokens_but_padding_and_one_of_each(build, batches, calibration, calibrated):
    model = build("bert")
    embedding = copy.deepcopy(model.bert.embeddings.word_embeddings)
    counts = torch.ones(100, dtype=torch.float64)
    for batch in batches if calibrated else ():
        for row, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True):
            for token, real in zip(row, mask, strict=True):
                counts[token] += real
    expected = factorize_embedding(embedding, 8, counts)
    _apply(model, calibration if calibrated else None, rank=8)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, expected.weight)


def test_the_parameters_are_those_of_both_factors(build, family):
    model = build(family)
    rows, width = model.get_input_embeddings().weight.shape
    before = model.num_parameters()
    _apply(model, rank=8)
    assert before - model.num_parameters() == rows * width - 8 * (rows + width)
    assert replacements(model) == [(PATHS[family], {"kind": "factorized_embedding", "rank": 8})]


def test_reload_is_bit_equal(build, calibration, family, reload_equal):
    loaded = reload_equal(_apply(build(family), calibration, rank=8))
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, FactorizedEmbedding)
    assert embedding.padding_idx == loaded.config.pad_token_id


def test_the_model_computes_what_it_would_with_the_product_as_its_table(build, family, run):
    model, plain = build(family), build(family)
    _apply(model, rank=8)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    torch.testing.assert_close(run(model), run(plain))


def test_a_training_step_moves_both_factors(build, calibration):
    model = _apply(build("bert"), calibration, rank=8)
    factors = model.get_input_embeddings()
    before = copy.deepcopy(factors)
    calibration.loss(model, calibration.batches[0]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(factors.table.weight, before.table.weight)
    assert not torch.equal(factors.projection.weight, before.projection.weight)


def test_the_factors_run_under_bf16_autocast(build, run):
    model = _apply(build("bert"), rank=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(model)
    torch.testing.assert_close(low.float(), run(model), rtol=0.05, atol=0.05)


def test_the_factors_export_to_onnx():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    factors = factorize_embedding(_embedding().float(), 5, _counts()).eval()
    ids = torch.tensor([[3, 29, 1], [0, 3, 7]])
    file = io.BytesIO()
    torch.onnx.export(factors, (ids,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), factors(ids).detach())


def test_a_language_model_whose_decoder_is_its_own_is_factorised(build, reload_equal):
    model = build("bert", "MaskedLM", tie_word_embeddings=False)
    reload_equal(_apply(model, rank=8))


def test_the_encoder_of_a_choice_is_counted_too(build):
    ids = torch.randint(5, 100, (6, 8), generator=torch.Generator().manual_seed(0))
    batch = TaskBatch(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids), torch.zeros(2), num_choices=3)
    model = build("bert", "MultipleChoice")
    embedding = copy.deepcopy(model.get_input_embeddings())
    _apply(model, Calibration([batch], lambda model, batch: torch.zeros(())), rank=8)
    counts = 1.0 + torch.bincount(ids.flatten(), minlength=100).double()
    assert torch.equal(model.get_input_embeddings().weight, factorize_embedding(embedding, 8, counts).weight)


def test_a_tied_decoder_is_refused(build, family):
    model = build(family, "MaskedLM")
    with pytest.raises(UserError, match=r"the decoder of .* is tied to the word embeddings"):
        _apply(model, rank=8)


def test_a_rank_larger_than_the_matrix_is_refused(build):
    with pytest.raises(UserError, match=r"rank 33 is larger than the 100 × 32 matrix bert\.embeddings"):
        _apply(build("bert"), rank=33)


def test_a_rank_that_saves_nothing_is_refused(build):
    with pytest.raises(UserError, match=r"rank 25 does not make the 100 × 32 matrix .* ranks up to 24 do"):
        _apply(build("bert"), rank=25)
    _apply(build("bert"), rank=24)


def test_a_second_time_is_refused(build):
    model = _apply(build("bert"), rank=8)
    with pytest.raises(UserError, match="factorised already"):
        _apply(model, rank=4)


def test_coded_embeddings_are_refused(build):
    model = build("bert")
    nn.utils.parametrizations.weight_norm(model.get_input_embeddings())
    with pytest.raises(UserError, match="pruned or clustered already"):
        _apply(model, rank=8)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValidationError, match="rank"):
        FactorizeEmbeddingsOptions(rank=0)


def test_a_model_without_a_table_of_words_is_refused():
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    with pytest.raises(UserError, match="ViTModel has no word embeddings"):
        _apply(transformers.ViTModel(config), rank=4)
