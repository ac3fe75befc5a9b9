"""Tiny random models with a tokenizer, exported once for all tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fastdistil.data.task_batches import TaskBatch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz.;,?", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 0,
}


def build_tiny(family: str, head: str = "SequenceClassification") -> Any:
    """In eval mode, with all weights random, so that a forgotten bias or norm shows."""
    config: Any
    match family:
        case "bert":
            config = transformers.BertConfig(**SIZES)
        case "roberta":
            config = transformers.RobertaConfig(**SIZES)
        case "electra":
            config = transformers.ElectraConfig(embedding_size=24, **SIZES)
        case "distilbert":
            config = transformers.DistilBertConfig(
                vocab_size=len(VOCABULARY), dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3
            )
            config.max_position_embeddings = 40
        case "modernbert":
            ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
            # The second layer sees two tokens to either side.
            layers = {"local_attention": 4, "layer_types": ["full_attention", "sliding_attention"]}
            config = transformers.ModernBertConfig(**layers, **ids, **SIZES)
    if head == "QuestionAnswering":
        config.num_labels = 2
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_inputs(batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every row but the first has padding; masks are bool, as those of `TaskBatch`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(VOCABULARY), (batch_size, length), generator=generator)
    lengths = torch.randint(3, length + 1, (batch_size, 1), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths
    types = (torch.arange(length) > length // 2).long().expand_as(ids) * mask
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask, "token_type_ids": types}


def make_batches(count: int = 3) -> list[TaskBatch]:
    return [
        TaskBatch(**make_inputs(4, 16, seed), labels=torch.randint(3, (4,))) for seed in range(1, count + 1)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="session")
def bert() -> Any:
    return build_tiny("bert")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, bert: Any, tokenizer: Any) -> Path:
    """A folder of transformers."""
    folder = tmp_path_factory.mktemp("source") / "model"
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory, bert: Any, tokenizer: Any) -> Path:
    pytest.importorskip("onnxruntime")
    from fastdistil.export.onnx import export_onnx

    return export_onnx(bert, tokenizer, tmp_path_factory.mktemp("onnx") / "model")


@pytest.fixture(scope="session")
def int8_folder(tmp_path_factory: pytest.TempPathFactory, onnx_folder: Path) -> Path:
    from fastdistil.export.onnx_int8 import quantize_onnx

    return quantize_onnx(onnx_folder, tmp_path_factory.mktemp("int8") / "model")


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    return build_tiny


@pytest.fixture(scope="session")
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    return make_inputs


@pytest.fixture
def batches() -> list[TaskBatch]:
    return make_batches()
