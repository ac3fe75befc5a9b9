import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from fastdistil.compress import replacements
from fastdistil.compress.replacements import record, replace
from fastdistil.compress.store import cast, is_compressed, load
from fastdistil.errors import UserError
from fastdistil.models.bilstm import make_bilstm
from fastdistil.models.stack import STACKS

DENSE = "bert.encoder.layer.0.intermediate.dense"
OUTPUT = "bert.encoder.layer.0.output.dense"


def _narrow(model: Any, prefix: str = "bert.") -> Any:
    for path, sizes in ((DENSE, (32, 40)), (OUTPUT, (40, 32))):
        spec = {"kind": "linear", "in_features": sizes[0], "out_features": sizes[1]}
        linear = nn.Linear(*sizes, dtype=model.dtype)
        replace(model, prefix + path.removeprefix("bert."), linear, spec)
    return model


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_plain_folder_of_every_family_is_loaded_bit_equal(build: Any, family: str, reload_equal: Any) -> None:
    reload_equal(build(family))


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM", "QuestionAnswering", ""])
def test_compressed_folder_is_loaded_bit_equal(build: Any, head: str, reload_equal: Any) -> None:
    # MaskedLM has tied embeddings, an encoder alone has paths without a prefix.
    model = _narrow(build("bert", head), "bert." if head else "")
    loaded = reload_equal(model)
    assert type(loaded) is type(model)
    assert replacements.replacements(loaded) == replacements.replacements(model)


def test_tied_embeddings_are_still_one_tensor(build: Any, reload_equal: Any) -> None:
    loaded = reload_equal(_narrow(build("bert", "MaskedLM")))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_model_that_was_loaded_can_be_compressed_and_loaded(
    build: Any, save: Callable[..., Path], reload_equal: Any
) -> None:
    # from_pretrained of an encoder's folder remembers to write names without the prefix.
    encoder = build("bert", "")
    model = transformers.BertForSequenceClassification.from_pretrained(save(encoder, "plain"))
    reload_equal(_narrow(model.eval()))


def test_encoder_without_pooler_is_loaded(build: Any, reload_equal: Any) -> None:
    model = build("bert", "")
    model.pooler = None
    assert reload_equal(model).pooler is None
    assert reload_equal(_narrow(model, "")).pooler is None


def test_modules_shared_by_layers_are_shared_again(tiny_bert: Any, reload_equal: Any) -> None:
    @replacements.replacement("test_shared")
    def build_shared(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
        assert isinstance(module, nn.ModuleList)
        module[1] = module[0]
        return module

    path = "bert.encoder.layer"
    try:
        replace(tiny_bert, path, build_shared(tiny_bert.get_submodule(path), {}), {"kind": "test_shared"})
        loaded = reload_equal(tiny_bert)
    finally:
        del replacements._BUILDERS["test_shared"]
    layers = loaded.bert.encoder.layer
    assert layers[1].output.dense.weight is layers[0].output.dense.weight


def test_encoded_buffers_are_the_stored_state(tiny_bert: Any, save: Any, run: Any) -> None:
    class Halves(nn.Module):
        """Whole weights kept as int8 of halves, decoded when the state is loaded."""

        def __init__(self, codes: torch.Tensor) -> None:
            super().__init__()
            self.codes = nn.Buffer(codes)
            self.weight = nn.Buffer(codes / 2, persistent=False)

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            self.weight.copy_(self.codes / 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    @replacements.replacement("test_halves")
    def build_halves(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
        return Halves(torch.zeros(spec["shape"], dtype=torch.int8))

    codes = torch.randint(-3, 4, (48, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    replace(tiny_bert, DENSE, Halves(codes), {"kind": "test_halves", "shape": [48, 32]})
    try:
        folder = save(tiny_bert)
        loaded = load(folder)
    finally:
        del replacements._BUILDERS["test_halves"]
    stored = {name: t.dtype for name, t in load_file(folder / "model.safetensors").items() if DENSE in name}
    assert stored == {f"{DENSE}.codes": torch.int8}
    assert torch.equal(run(loaded), run(tiny_bert))


def test_dtypes_of_the_file_are_kept(tiny_bert: Any, save: Any, reload_equal: Any) -> None:
    model = _narrow(tiny_bert.to(torch.bfloat16))
    model.classifier.float()
    model.bert.pooler.float()
    model.bert.encoder.layer[1].output.float()
    hook = model.bert.encoder.layer[1].output.register_forward_pre_hook(
        lambda module, args: tuple(arg.float() for arg in args)
    )
    folder = save(model)
    hook.remove()
    loaded = load(folder)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert load(folder, dtype=torch.float32).dtype == torch.float32


def test_cast_model_is_loaded_bit_equal(
    build: Any, family: str, reload_equal: Any, save: Any, run: Any
) -> None:
    model = cast(build(family), torch.bfloat16)
    path = f"{model.base_model_prefix}.{STACKS[family]}.0"
    assert {weight.dtype for weight in model.get_submodule(path).parameters()} == {torch.bfloat16}
    # A replacement, so that it is not transformers that loads it.
    record(model, path, {"kind": "test_same"})
    replacements._BUILDERS["test_same"] = lambda module, spec: module
    try:
        reload_equal(model)
        assert torch.equal(run(load(save(build(family)), dtype=torch.bfloat16)), run(model))
    finally:
        del replacements._BUILDERS["test_same"]


def test_sharded_weights_are_loaded(tiny_bert: Any, tmp_path: Path, run: Any) -> None:
    model = _narrow(tiny_bert)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(run(load(tmp_path)), run(model))


def test_bilstm_folder_is_loaded(build: Any, save: Any, run: Any) -> None:
    student = make_bilstm(build("bert"), pairs=False, hidden_size=6, fc_size=5).eval()
    assert torch.equal(run(load(save(student))), run(student))


def test_loading_draws_no_random_numbers(tiny_bert: Any, save: Any) -> None:
    folder = save(_narrow(tiny_bert))
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_folder_with_replacements_is_compressed(build: Any, save: Any, tmp_path: Path) -> None:
    assert is_compressed(save(_narrow(build("bert")), "compressed"))
    assert not is_compressed(save(build("bert"), "plain"))
    assert not is_compressed(tmp_path / "nowhere")


def test_a_folder_is_found_from_the_home_folder_on(
    build: Any, save: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (build("bert"), _narrow(build("bert"))):
        folder = save(model)
        monkeypatch.setenv("HOME", str(folder.parent))
        assert torch.equal(run(load(f"~/{folder.name}")), run(model))


def test_another_class_may_be_asked_for(build: Any, save: Any, run: Any) -> None:
    model = _narrow(build("bert"))
    folder = save(model)
    for auto in (transformers.AutoModelForSequenceClassification, transformers.BertForSequenceClassification):
        assert torch.equal(run(load(folder, auto)), run(model))
    with pytest.raises(UserError, match=r"are missing, the first is 'cls\.predictions\.bias'"):
        load(folder, transformers.AutoModelForMaskedLM)


class TestBadFolder:
    @pytest.fixture
    def folder(self, tiny_bert: Any, save: Any) -> Path:
        return save(_narrow(tiny_bert))

    def _change_weights(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        weights = load_file(folder / "model.safetensors")
        weights = {name: weight.clone() for name, weight in weights.items()}
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def test_missing_weight(self, folder: Path) -> None:
        self._change_weights(folder, lambda weights: weights.pop(f"{DENSE}.bias"))
        with pytest.raises(UserError, match=f"1 are missing, the first is '{DENSE}.bias'"):
            load(folder)

    def test_unexpected_weight(self, folder: Path) -> None:
        self._change_weights(folder, lambda weights: weights.update(other=torch.ones(1)))
        with pytest.raises(UserError, match="nothing reads 1 of them, the first is 'other'"):
            load(folder)

    def test_weight_of_another_shape(self, folder: Path) -> None:
        self._change_weights(folder, lambda weights: weights.update({f"{DENSE}.bias": torch.ones(39)}))
        with pytest.raises(UserError, match=rf"do not fit .*{DENSE}.bias"):
            load(folder)

    def test_unknown_kind(self, folder: Path) -> None:
        _edit_config(folder, fastdistil={"replacements": [[DENSE, {"kind": "magic"}]]})
        with pytest.raises(UserError, match=f"{folder}: .*unknown kind, 'magic'"):
            load(folder)

    def test_later_format(self, folder: Path) -> None:
        _edit_config(folder, fastdistil={"format": 2, "replacements": []})
        with pytest.raises(UserError, match="format 2"):
            load(folder)

    def test_pickled_weights_are_not_read(self, folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="no safetensors weights"):
            load(folder)

    def test_torn_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"x" * 20)
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            load(folder)

    def test_shard_outside_of_the_folder(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"x": "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="not the name of a file in the folder"):
            load(folder)

    def test_remote_code_is_not_run(self, folder: Path) -> None:
        (folder / "modeling.py").write_text("raise SystemExit('remote code was run')")
        _edit_config(folder, auto_map={"AutoConfig": "modeling.C"}, model_type="theirs")
        with pytest.raises(UserError, match="no model can be loaded"):
            load(folder)

    def test_unknown_class(self, folder: Path) -> None:
        _edit_config(folder, architectures=["BertForTelepathy"])
        with pytest.raises(UserError, match="architectures is \\['BertForTelepathy'\\]"):
            load(folder)

    def test_threads_are_for_another_runtime(self, folder: Path) -> None:
        with pytest.raises(UserError, match="threads is for models of another runtime"):
            load(folder, threads=1)

    def test_plain_folder_that_lacks_weights(self, build: Any, save: Any) -> None:
        plain = save(build("bert"), "plain")
        self._change_weights(plain, lambda weights: weights.pop("classifier.bias"))
        with pytest.raises(UserError, match=r"1 are missing, the first is 'classifier.bias'"):
            load(plain)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere"):
            load(tmp_path / "nowhere")
