"""Loading folders: what is there is loaded exactly, what is missing is named in one line."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fastdistil.errors import UserError
from fastdistil.models.bilstm import make_bilstm
from fastdistil.models.load import (
    load_encoder,
    load_encoder_with_new_head,
    load_masked_lm,
    max_positions,
    read_depth,
)
from fastdistil.models.student import check_same_tokenizer

REAL_ENCODER = Path(__file__).parents[3] / "shared" / "models" / "encoder-12x384"


def make_tokenizer(*, lowercase: bool = True, extra: tuple[str, ...] = (), mask: str | None = "[MASK]"):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,-", *extra]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token=mask,
    )


@pytest.fixture
def bert_folder(build, tmp_path):
    build("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def headless_folder(build, tmp_path):
    build("bert").bert.half().save_pretrained(tmp_path / "headless")
    make_tokenizer().save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


def test_every_family_loads_with_its_logits_in_eval_mode(tiny_model, tiny_batch, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_masked_lm(tmp_path)
    ids, mask = tiny_batch(tiny_model)
    assert torch.equal(model(ids, mask).logits, tiny_model(ids, mask).logits)
    assert not model.training
    assert tokenizer.mask_token_id == 4


def test_a_missing_head_is_named_with_the_recipe_that_grows_one(headless_folder, caplog, capfd):
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        load_masked_lm(headless_folder)
    message = str(caught.value)
    assert "'cls.predictions' of BertForMaskedLM is missing" in message
    assert f"fastdistil train mlm --teacher {headless_folder}" in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""


def test_a_discriminator_is_not_taken_for_a_generator(build, tmp_path):
    build("electra").electra.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="generator_lm_head"):
        load_masked_lm(tmp_path)


@pytest.mark.parametrize("pooler", [False, True])
def test_an_encoder_is_loaded_without_head_and_pooler(tiny_model, tiny_batch, tmp_path, pooler):
    """From a folder with a head, and from one with an encoder alone and a pooler, where a family has one."""
    model = tiny_model
    if pooler:
        model = transformers.AutoModel.from_config(tiny_model.config)
        model.load_state_dict(tiny_model.base_model.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    encoder, tokenizer = load_encoder(tmp_path)
    ids, mask = tiny_batch(tiny_model)
    expected = tiny_model.base_model(ids, mask).last_hidden_state
    assert torch.equal(encoder(ids, mask).last_hidden_state, expected)
    assert encoder.base_model is encoder
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]
    assert not encoder.training
    assert tokenizer.mask_token_id == 4


def test_a_new_head_keeps_the_encoder_in_float32_and_is_tied(headless_folder, build, tiny_batch):
    model, _ = load_encoder_with_new_head(headless_folder)
    original = build("bert")
    ids, mask = tiny_batch(original)
    expected = original.bert.half().float()(ids, mask).last_hidden_state
    torch.testing.assert_close(model.bert(ids, mask).last_hidden_state, expected)
    predictions = model.cls.predictions
    assert predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias
    assert 0.01 < predictions.transform.dense.weight.std() < 0.04
    assert predictions.bias.eq(0).all()


def test_a_trained_new_head_survives_saving(headless_folder, tmp_path, tiny_batch):
    model, tokenizer = load_encoder_with_new_head(headless_folder)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    loaded, _ = load_masked_lm(tmp_path / "grown")
    ids, mask = tiny_batch(model)
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)


def test_token_counts_start_the_bias_at_the_log_frequency(headless_folder):
    counts = torch.arange(61)
    model, _ = load_encoder_with_new_head(headless_folder, token_counts=counts)
    bias = model.get_output_embeddings().bias
    torch.testing.assert_close(bias.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(bias[60] - bias[0], torch.tensor(61.0).log())


def test_a_head_that_the_folder_has_is_kept(bert_folder, build):
    model, _ = load_encoder_with_new_head(bert_folder, token_counts=torch.ones(61))
    assert torch.equal(model.cls.predictions.bias, build("bert").cls.predictions.bias)


@pytest.fixture
def pair_folder(build, save):
    return save(build("bert", "PreTraining"))


def test_a_next_sentence_head_is_kept_only_where_it_is_asked_for(build, pair_folder, tiny_pair):
    original = build("bert", "PreTraining")
    kept, _ = load_masked_lm(pair_folder, next_sentence=True)
    assert not kept.training
    ours, theirs = kept(**tiny_pair), original(**tiny_pair)
    assert torch.equal(ours.seq_relationship_logits, theirs.seq_relationship_logits)
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)
    model, _ = load_masked_lm(pair_folder)
    assert type(model) is transformers.BertForMaskedLM
    assert torch.equal(model(**tiny_pair).logits, theirs.prediction_logits)


def test_a_masked_language_model_stays_one_where_no_next_sentence_head_is(bert_folder):
    assert type(load_masked_lm(bert_folder, next_sentence=True)[0]) is transformers.BertForMaskedLM


def test_a_next_sentence_head_whose_pooler_is_missing_is_refused(build, save):
    model = build("bert", "PreTraining")
    model.bert.pooler = None
    with pytest.raises(UserError, match=r"encoder weights are missing, the first is 'bert.pooler"):
        load_masked_lm(save(model), next_sentence=True)


@pytest.mark.parametrize("family", ["bert", "mobilebert"])
def test_pooler_and_next_sentence_head_are_fresh_where_they_lack(build, save, tiny_batch, family):
    original = build(family)
    counts = torch.ones(61)
    folder = save(original)
    torch.manual_seed(0)
    model, _ = load_encoder_with_new_head(folder, token_counts=counts, next_sentence=True)
    assert type(model) is type(build(family, "PreTraining"))
    assert not model.training
    ids, mask = tiny_batch(original)
    # The masked-language-model head is there, so that it is kept as it is.
    assert torch.equal(model(ids, mask).prediction_logits, original(ids, mask).logits)
    for fresh in (model.base_model.pooler.dense, model.cls.seq_relationship):
        assert 0.01 < fresh.weight.std() < 0.04
        assert fresh.bias.eq(0).all()
    torch.manual_seed(0)
    again, _ = load_encoder_with_new_head(folder, next_sentence=True)
    assert torch.equal(again.cls.seq_relationship.weight, model.cls.seq_relationship.weight)


def test_an_encoder_gets_all_heads_and_keeps_its_pooler(build, save):
    encoder = build("bert", "PreTraining").bert
    counts = torch.arange(61)
    model, _ = load_encoder_with_new_head(save(encoder), token_counts=counts, next_sentence=True)
    assert torch.equal(model.bert.pooler.dense.weight, encoder.pooler.dense.weight)
    bias = model.cls.predictions.decoder.bias
    torch.testing.assert_close(bias[60] - bias[0], torch.tensor(61.0).log())
    assert 0.01 < model.cls.seq_relationship.weight.std() < 0.04


def test_all_trained_heads_are_kept(build, pair_folder, tiny_pair):
    model, _ = load_encoder_with_new_head(pair_folder, token_counts=torch.ones(61), next_sentence=True)
    ours, theirs = model(**tiny_pair), build("bert", "PreTraining")(**tiny_pair)
    assert torch.equal(ours.seq_relationship_logits, theirs.seq_relationship_logits)
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("roberta", "RobertaForMaskedLM is not a model with a next-sentence head; BERT and MobileBERT"),
        ("electra", "ElectraForPreTraining is not a model with a next-sentence head; BERT and MobileBERT"),
        ("modernbert", "cannot be loaded as a model with a next-sentence head"),
    ],
)
def test_a_family_without_next_sentence_head_is_one_line(build, save, family, message):
    with pytest.raises(UserError, match=message) as caught:
        load_encoder_with_new_head(save(build(family)), next_sentence=True)
    assert "\n" not in str(caught.value)


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def without_tokenizer(folder: Path) -> None:
    drop(folder, "tokenizer.json")
    drop(folder, "tokenizer_config.json")


def as_pickle(folder: Path) -> None:
    drop(folder, "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")


def as_gpt(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def deeper(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: drop(folder, "config.json"), "not a model folder, it has no config.json"),
        (lambda folder: drop(folder, "model.safetensors"), "no safetensors weights"),
        (as_pickle, "no safetensors weights"),
        (as_gpt, "cannot be loaded as a masked language model"),
        (truncated, "cannot be loaded as a masked language model"),
        (deeper, r"encoder weights are missing, the first is 'bert.encoder.layer.4"),
        (wider, "cannot be loaded as a masked language model"),
        (without_tokenizer, "no tokenizer"),
        (lambda folder: make_tokenizer(mask=None).save_pretrained(folder), "no mask token"),
        (
            lambda folder: make_tokenizer(extra=tuple("ABCDEFGHIJKLMNOPQR")).save_pretrained(folder),
            "62 tokens",
        ),
    ],
)
def test_a_spoiled_folder_gives_one_line_that_names_it(bert_folder, spoil, message):
    spoil(bert_folder)
    with pytest.raises(UserError, match=message) as caught:
        load_masked_lm(bert_folder)
    assert str(caught.value).startswith(str(bert_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (as_pickle, "no safetensors weights"),
        (truncated, "cannot be loaded as an encoder"),
        (
            deeper,
            r"weights do not fit BertModel: \d+ encoder weights are missing, the first is 'encoder.layer.4",
        ),
        (without_tokenizer, "no tokenizer"),
    ],
)
def test_a_spoiled_encoder_folder_gives_one_line_that_names_it(headless_folder, spoil, message):
    spoil(headless_folder)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(headless_folder)
    assert str(caught.value).startswith(str(headless_folder))
    assert "\n" not in str(caught.value)


def test_a_bilstm_is_an_encoder_and_no_masked_language_model(build, save):
    student = make_bilstm(build("bert", "SequenceClassification"), pairs=False)
    folder = save(student)
    encoder, _ = load_encoder(folder)
    assert torch.equal(encoder.embeddings.weight, student.bilstm.embeddings.weight)
    with pytest.raises(UserError, match="cannot be loaded as a masked language model") as caught:
        load_masked_lm(folder)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="nobody/nothing: neither a folder here nor a model that the hub gives"
    ):
        load_masked_lm("nobody/nothing")


def test_equal_tokenizers_pass_and_the_first_difference_is_named():
    base = make_tokenizer()
    check_same_tokenizer(base, make_tokenizer())
    with pytest.raises(UserError, match=r"token 44 is None in the first but 'xyz' in the second"):
        check_same_tokenizer(base, make_tokenizer(extra=("xyz",)))
    with pytest.raises(UserError, match="the mask_token is '\\[MASK\\]' in the first but None"):
        check_same_tokenizer(base, make_tokenizer(mask=None))
    with pytest.raises(UserError, match=r"the same text becomes \['elan'.*but \['\[UNK\]'"):
        check_same_tokenizer(
            make_tokenizer(extra=("elan",)), make_tokenizer(extra=("elan",), lowercase=False)
        )


def test_whose_tokenizers_differ_and_why_they_must_not_is_said():
    """A task's teacher and student compare no vocabulary, but they are given the same batch."""
    message = r"^student and augment\.masked_lm have .* both are given the same token ids$"
    with pytest.raises(UserError, match=message):
        check_same_tokenizer(
            make_tokenizer(), make_tokenizer(extra=("xyz",)), ("student", "augment.masked_lm")
        )


def test_the_depth_of_a_model_is_read_without_its_weights(build, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for family in ("bert", "distilbert", "modernbert"):
        config = build(family).config
        config.save_pretrained(str(tmp_path / family))
        assert read_depth(f"~/{family}") == config.num_hidden_layers
    with pytest.raises(UserError, match=r"^~/none: no such folder$"):
        read_depth("~/none")


@pytest.mark.skipif(not REAL_ENCODER.is_dir(), reason="the shared encoder folder is not on this machine")
def test_the_real_encoder_has_no_head_and_grows_one():
    with pytest.raises(UserError, match=r"'cls.predictions' of BertForMaskedLM is missing"):
        load_masked_lm(REAL_ENCODER)
    model, tokenizer = load_encoder_with_new_head(REAL_ENCODER)
    assert model.dtype == torch.float32
    batch = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    with torch.no_grad():
        loss = torch.logsumexp(model(**batch).logits[0, 6], -1)
    assert loss.isfinite()


@pytest.mark.parametrize(
    "name", ["Bert", "Roberta", "XLMRoberta", "Camembert", "MPNet", "Electra"], ids=str.lower
)
def test_the_longest_sequence_is_the_longest_that_runs(name):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        **sizes, intermediate_size=16, max_position_embeddings=12, pad_token_id=1
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    longest = max_positions(model)
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_a_family_without_a_number_of_positions_is_refused():
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="T5EncoderModel: its config names no max_position_embeddings"):
        max_positions(transformers.T5EncoderModel(config))


def test_a_folder_may_be_given_from_the_home_folder_on(tmp_path, monkeypatch):
    """Behind --set, where no shell expands it."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=16))
    model.save_pretrained(str(tmp_path / "encoder"))
    make_tokenizer().save_pretrained(str(tmp_path / "encoder"))
    monkeypatch.setenv("HOME", str(tmp_path))
    found, _ = load_encoder("~/encoder")
    assert found.config.hidden_size == 16
