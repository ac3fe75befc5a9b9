"""The quantisation methods: backends, the choice between them, and what they refuse."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastdistil.compress import quantize_choice
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.quantize import METHODS, Int8Options, NoOptions, OnnxInt8Options, apply_bf16
from fastdistil.compress.quantize_choice import Measured, add_note, choose, fastest
from fastdistil.compress.replacements import replacements
from fastdistil.compress.store import load
from fastdistil.errors import RunError, UserError
from fastdistil.evaluate.cost import bytes_on_disk

Run = Callable[[Any], Tensor]
BY_NAME: dict[str, Method] = {method.name: method for method in METHODS}
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnxruntime", "onnxscript")),
    reason="onnxruntime is not installed",
)


def _apply(name: str, model: Any, calibration: Calibration | None = None, **options: Any) -> Any:
    method = BY_NAME[name]
    chosen = method.options.model_validate(options)
    return method.finish(method.apply(model, chosen, calibration), chosen)


def test_bf16_halves_the_bytes_and_reloads_to_the_last_bit(
    tiny_bert: Any, save: Callable[..., Path], run: Run
) -> None:
    expected, size = run(tiny_bert), bytes_on_disk(save(tiny_bert, "float"))
    folder = save(apply_bf16(tiny_bert, NoOptions(), None), "bf16")
    assert bytes_on_disk(folder) < 0.6 * size  # a header of some KB is in both
    loaded = load(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(run(loaded), run(tiny_bert))
    torch.testing.assert_close(run(loaded).float(), expected, rtol=0, atol=0.05)


def test_bf16_after_a_replacement_reloads(tiny_bert: Any, reload_equal: Any) -> None:
    from fastdistil.compress.low_rank import LowRankOptions, low_rank

    loaded = reload_equal(apply_bf16(low_rank(tiny_bert, LowRankOptions(ratio=0.5), None), NoOptions(), None))
    assert loaded.dtype == torch.bfloat16


@needs_onnx
@pytest.mark.slow
def test_onnx_int8_keeps_its_outputs_and_reloads(
    tiny_bert: Any, save: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    model = load(save(tiny_bert))
    expected = run(model)
    int8 = _apply("onnx-int8", model)
    output = run(int8)
    assert (output - expected).norm() / expected.norm() < 0.04
    int8.save_pretrained(tmp_path / "int8")
    assert torch.equal(run(load(tmp_path / "int8")), output)
    assert torch.equal(run(model), expected)  # the float model is as it was


@needs_onnx
@pytest.mark.slow
def test_four_bit_word_embeddings_after_a_pruning_reload(
    tiny_bert: Any, save: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    from fastdistil.compress.prune_ffn import METHODS as PRUNE_FFN

    (prune,) = PRUNE_FFN
    model = load(save(tiny_bert))
    pruned = prune.apply(model, prune.options.model_validate({"ratio": 0.5}), None)
    expected = run(pruned)
    int8, int4 = (_apply("onnx-int8", load(save(pruned, "pruned")), embedding_bits=bits) for bits in (8, 4))
    output = run(int4)
    assert not torch.equal(output, run(int8))
    assert (output - expected).norm() / expected.norm() < 0.2
    int4.save_pretrained(tmp_path / "int4")
    assert torch.equal(run(load(tmp_path / "int4")), output)


@needs_onnx
@pytest.mark.slow
def test_onnx_computes_the_same(tiny_bert: Any, save: Callable[..., Path], run: Run) -> None:
    model = load(save(tiny_bert))
    torch.testing.assert_close(run(_apply("onnx", model)), run(model), rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.slow
def test_onnx_of_int8_embeddings_computes_the_same(
    tiny_bert: Any, save: Callable[..., Path], run: Run
) -> None:
    model = _apply("int8-embeddings", load(save(tiny_bert)))
    torch.testing.assert_close(run(_apply("onnx", model)), run(model), rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.slow
def test_static_onnx_keeps_its_outputs(
    tiny_bert: Any, save: Callable[..., Path], run: Run, calibration: Calibration
) -> None:
    model = load(save(tiny_bert))
    expected = run(model)
    output = run(_apply("int8-static", model, calibration, backend="onnxruntime"))
    assert (output - expected).norm() / expected.norm() < 0.05


@needs_onnx
@pytest.mark.slow
def test_auto_measures_both_backends(
    tiny_bert: Any, save: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    int8 = _apply("int8", load(save(tiny_bert)), calibration)
    int8.save_pretrained(tmp_path / "int8")
    (note,) = load(tmp_path / "int8").config.fastdistil["notes"]
    for word in ("float", "onnxruntime", "torchao", "loss", "Took"):
        assert word in note


def test_auto_takes_the_fastest_that_keeps_the_loss() -> None:
    measured = {
        "float": Measured(10, 0.30),
        "onnxruntime": Measured(2, 0.40),
        "torchao": Measured(5, 0.31),
    }
    assert choose(measured, 0.2) == ("onnxruntime", "")
    assert choose(measured, 0.05) == ("torchao", "")


def test_auto_takes_the_lowest_loss_where_none_keeps_it() -> None:
    measured = {"float": Measured(10, 0.3), "onnxruntime": Measured(2, 0.5), "torchao": Measured(5, 0.4)}
    assert choose(measured, 0.05) == ("torchao", ": none keeps the loss within 0.05, this one has the lowest")


def test_auto_says_when_int8_is_slower() -> None:
    measured = {"float": Measured(10, 0.3), "onnxruntime": Measured(12, 0.3), "torchao": Measured(15, 0.3)}
    assert choose(measured, 0.05) == ("onnxruntime", "; int8 is slower than float here")


def test_auto_without_examples_goes_by_speed_and_says_so() -> None:
    measured = {"float": Measured(10, math.nan), "onnxruntime": Measured(2, math.nan)}
    assert choose(measured, 0.05) == ("onnxruntime", ", without examples to look at the loss")


def test_auto_goes_on_without_a_backend_that_fails(tiny_bert: Any, calibration: Calibration) -> None:
    def broken() -> Any:
        raise RunError("it answers something else")

    builders = {"onnxruntime": broken, "torchao": lambda: _apply("int8", tiny_bert, backend="torchao")}
    model = fastest(tiny_bert, builders, calibration, 0.05)
    (note,) = model.config.fastdistil["notes"]
    assert note.endswith("Without onnxruntime: it answers something else.")
    with pytest.raises(UserError, match="no int8 backend serves: onnxruntime: it answers something else"):
        fastest(tiny_bert, {"onnxruntime": broken}, calibration, 0.05)


def test_auto_leaves_the_float_model_alone(
    tiny_bert: Any, run: Run, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_choice, "_RUNS", 1)
    expected = run(tiny_bert)
    # It came from no folder, so that there is no tokenizer to check an export with.
    int8 = _apply("int8", tiny_bert, calibration)
    assert "Without onnxruntime: the model was loaded from no folder" in int8.config.fastdistil["notes"][0]
    assert torch.equal(run(tiny_bert), expected)
    assert not torch.equal(run(int8), expected)


def test_notes_are_kept_by_a_folder(tiny_bert: Any, save: Callable[..., Path]) -> None:
    model = _apply("int8", tiny_bert, backend="torchao")
    add_note(model, "One.")
    add_note(model, "Two.")
    assert load(save(model)).config.fastdistil["notes"] == ["One.", "Two."]


QUANTISING = [name for name in BY_NAME if name != "onnx"]


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("int8", "quantised \\(.*int8_linear\\) already"),
        ("int8-static", "quantised \\(.*int8_linear\\) already"),
        ("bf16", "bfloat16 already"),
    ],
)
def test_what_is_quantised_is_not_quantised_again(
    first: str, said: str, name: str, tiny_bert: Any, calibration: Calibration
) -> None:
    options = {} if first == "bf16" else {"backend": "torchao"}
    model = _apply(first, tiny_bert, calibration, **options)
    with pytest.raises(UserError, match=f"^{name}: the model is {said}"):
        _apply(name, model, calibration)


@pytest.mark.parametrize("name", QUANTISING)
def test_int8_embeddings_are_not_quantised_again(name: str, tiny_bert: Any, calibration: Calibration) -> None:
    model = _apply("int8-embeddings", tiny_bert)
    with pytest.raises(UserError, match="the model is quantised \\(int8_embedding\\) already"):
        _apply(name, model, calibration)


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_model_of_another_runtime_is_not_quantised(
    name: str, tiny_bert: Any, calibration: Calibration
) -> None:
    tiny_bert.config.fastdistil = {"runtime": "onnxruntime", "quantized": "dynamic"}
    with pytest.raises(UserError, match="the model is an int8 model of onnxruntime already"):
        _apply(name, tiny_bert, calibration)


def test_static_needs_examples(tiny_bert: Any) -> None:
    with pytest.raises(
        UserError, match="int8-static sets its scales on a task's training examples: give a task"
    ):
        _apply("int8-static", tiny_bert)


@pytest.mark.parametrize("name", ["int8", "int8-qat"])
def test_onnxruntime_has_no_float_embeddings(name: str, tiny_bert: Any) -> None:
    with pytest.raises(UserError, match="embeddings: false is for the backend torchao"):
        _apply(name, tiny_bert, backend="onnxruntime", embeddings=False)


@pytest.mark.parametrize("name", ["int8", "int8-qat"])
def test_torchao_has_no_four_bit_embeddings(name: str, tiny_bert: Any) -> None:
    with pytest.raises(UserError, match="embedding_bits: 4 is for the backend onnxruntime"):
        _apply(name, tiny_bert, backend="torchao", embedding_bits=4)


def test_what_cannot_have_four_bits_is_refused_before_it_is_trained(tiny_bert: Any, build: Any) -> None:
    tiny_bert.set_input_embeddings(nn.Embedding(10_000, 7))
    with pytest.raises(UserError, match="packs entries in pairs, and the rows have 7: take 8"):
        BY_NAME["onnx-int8-qat"].apply(tiny_bert, OnnxInt8Options(embedding_bits=4), None)
    model = build("bert")
    for path in [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]:
        model.set_submodule(path, nn.Identity())
    with pytest.raises(UserError, match="embedding table of its own, and the model has none"):
        BY_NAME["onnx-int8-qat"].apply(model, OnnxInt8Options(embedding_bits=4), None)


def test_the_words_alone_are_trained_under_four_bits(tiny_bert: Any) -> None:
    model = BY_NAME["onnx-int8-qat"].apply(tiny_bert, OnnxInt8Options(embedding_bits=4), None)
    scales = {path: spec["scales"] for path, spec in replacements(model)}
    assert scales.pop("bert.embeddings.word_embeddings") == "block"
    assert "bert.embeddings.position_embeddings" in scales
    assert {*scales.values()} == {"tensor"}


def test_embeddings_have_four_or_eight_bits() -> None:
    from fastdistil.compare.steps import Step

    assert Step("onnx-int8", "4").method_options().embedding_bits == 4  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^onnx-int8\.embedding_bits: input should be 4 or 8, got 3$"):
        Step("onnx-int8", "3").method_options()


def test_a_model_with_nothing_to_quantise_is_refused(build: Any) -> None:
    model = build("bert")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear | nn.Embedding):
                setattr(module, name, nn.Identity())
    with pytest.raises(UserError, match="has no layer that int8 would make smaller"):
        _apply("int8", model, backend="torchao")


def test_an_unknown_backend_and_a_negative_bound_are_refused() -> None:
    with pytest.raises(ValidationError, match="backend"):
        Int8Options(backend="neural-compressor")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="max_loss_increase"):
        Int8Options(max_loss_increase=-1)
