"""A model as one ExecuTorch file (.pte) for phones and other devices, its matrix products on XNNPACK.

ExecuTorch plans its memory beforehand, so that batch and length have bounds. The file's weights are float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.errors import RunError, UserError
from fastdistil.evaluate.cost import count_parameters
from fastdistil.export.example import SHORTEST, example_inputs, open_axes, with_plain_weights
from fastdistil.export.folder import Exported, new_folder, write_exported
from fastdistil.export.onnx import check_model
from fastdistil.export.quiet import quiet, reason
from fastdistil.export.runtime import RuntimeModel
from fastdistil.export.verify import verify
from fastdistil.models.load import max_positions

FILE = "model.pte"
MAX_BATCH = 8
MAX_LENGTH = 128


def export_executorch(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    max_batch: int = MAX_BATCH,
    max_length: int = MAX_LENGTH,
    examples: Sequence[Any] = (),
) -> Path:
    """Write `model` as `folder`/model.pte, beside config and tokenizer, and return `folder`.

    Its outputs are compared with the model's before the folder gets its name. The export of a model of twelve
    layers takes minutes.

    Args:
        model: of transformers, with any head or none; its modules may have been replaced. It is exported in
            eval mode, and left as it was.
        max_batch: examples that the file takes at once.
        max_length: tokens that it takes; at most what the model has positions for.
        examples: `TaskBatch`es that the two are compared on, besides texts of our own.

    Raises:
        UserError: `folder` is there already, or the exporter refuses the model.
        RunError: the outputs differ from the model's.
    """
    check_model(model)
    if max_batch < 1:
        raise UserError(f"max_batch must be >= 1, got {max_batch}")
    length = min(max_length, max_positions(model))
    if length < SHORTEST:
        raise UserError(f"max_length must be >= {SHORTEST}, got {max_length}")
    with new_folder(folder) as partial:
        inputs, outputs = _write(model, partial / FILE, max_batch, length)
        tokenizer.save_pretrained(partial)
        facts = Exported(
            "executorch",
            FILE,
            count_parameters(model),
            max_batch=max_batch,
            max_length=length,
            inputs=inputs,
            outputs=outputs,
        )
        write_exported(partial, model.config, type(model).__name__, facts)
        result = verify(partial, model, tokenizer, examples)
        write_exported(partial, model.config, type(model).__name__, result.record(facts))
    return Path(folder).expanduser()


def _write(model: Any, file: Path, max_batch: int, max_length: int) -> tuple[list[str], list[str]]:
    """Returns the names of inputs and outputs, which a .pte has by number alone."""
    example = example_inputs(model, min(2, max_batch), min(16, max_length))
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in example.items()}
    training, model = model.training, with_plain_weights(model)
    try:
        from transformers.exporters.configs import ExecutorchConfig
        from transformers.exporters.exporter_executorch import ExecutorchExporter

        config = ExecutorchConfig(dynamic_shapes=open_axes(inputs, batch=max_batch, length=max_length))
        with quiet(), torch.no_grad():
            outputs = [name for name, value in model.eval()(**inputs).items() if isinstance(value, Tensor)]
            program = ExecutorchExporter().export(model, inputs, config).program
    except ModuleNotFoundError:
        raise
    except Exception as error:
        name = type(model).__name__
        raise UserError(f"{name} cannot be exported to ExecuTorch: {reason(error)}") from error
    finally:
        model.train(training)
    with file.open("wb") as stream:
        program.write_to_file(stream)
    return list(inputs), outputs


class ExecutorchModel(RuntimeModel):
    """A model on ExecuTorch. More examples than the file takes at once are passed in parts.

    ExecuTorch has one pool of threads for the whole process; the number that was set last is everyone's.
    """

    def __init__(self, folder: str | Path, config: Any, exported: Exported, threads: int | None) -> None:
        from executorch.runtime import Runtime

        super().__init__(folder, config, exported, threads)
        file = self.folder / exported.file
        try:
            self._method = Runtime.get().load_program(file).load_method("forward")
        except RuntimeError as error:
            raise UserError(f"{file} cannot be read by ExecuTorch: {reason(error)}") from None

    def set_threads(self, threads: int) -> None:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(threads)
        self.threads = threads

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        facts = self.exported
        assert facts.max_batch is not None
        assert facts.max_length is not None
        length = inputs["input_ids"].shape[-1]
        if length > facts.max_length:
            raise UserError(
                f"the ExecuTorch file takes texts of at most {facts.max_length} tokens, got {length}; export "
                "the model with a larger max_length"
            )
        parts = zip(*(inputs[name].split(facts.max_batch) for name in facts.inputs), strict=True)
        results = [self._execute(part) for part in parts]
        return {
            name: torch.cat(values)
            for name, values in zip(facts.outputs, zip(*results, strict=True), strict=True)
        }

    def _execute(self, part: tuple[Tensor, ...]) -> list[Tensor]:
        try:
            # The runtime writes the next outputs into the same memory.
            return [value.clone() for value in self._method.execute([x.contiguous() for x in part])]
        except RuntimeError as error:
            shape = tuple(part[0].shape)
            raise RunError(f"ExecuTorch failed on inputs of shape {shape}: {reason(error)}") from None
