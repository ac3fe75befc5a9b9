"""Exported models behind the face of a PyTorch model, so that they can be scored and measured like one."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdistil.errors import RunError, UserError
from fastdistil.export.example import is_choice
from fastdistil.export.folder import Exported, read_exported, write_exported
from fastdistil.export.quiet import reason

# ONNX Runtime's layer normalisation is vectorised, the one that it fuses with the sum before it is
# not: with it a float32 encoder is a sixth slower.
_SLOW_FUSION = "SkipLayerNormFusion"


class RuntimeModel(nn.Module):
    """A model of an exported folder: forward passes only, on the CPU.

    Attributes:
        config: of transformers.
        exported: what the folder says of the export.
        num_parameters_: of the PyTorch model it was made from; `parameters()` has none.
        threads: of the forward passes.
    """

    threads: int

    def __init__(self, folder: str | Path, config: Any, exported: Exported, threads: int | None) -> None:
        super().__init__()
        self.folder = Path(folder).expanduser()
        self.config = config
        self.exported = exported
        self.num_parameters_ = exported.parameters
        self.eval()
        self.set_threads(threads or torch.get_num_threads())

    def set_threads(self, threads: int) -> None:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def base_model(self) -> "RuntimeModel":
        return self

    def forward(
        self,
        input_ids: Tensor,  # (B, L); (B, C, L) for a choice
        attention_mask: Tensor | None = None,  # like input_ids, bool or 0/1
        token_type_ids: Tensor | None = None,
    ) -> Any:
        """An output of transformers with the outputs of the file."""
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        # One text with a single option, which is how a latency is measured.
        lone = input_ids.ndim == 2 and is_choice(self)
        inputs = {"input_ids": input_ids.long()}
        for name, value in given.items():
            default = torch.ones_like if name == "attention_mask" else torch.zeros_like
            inputs[name] = default(inputs["input_ids"]) if value is None else value.long()
        if lone:
            inputs = {name: value[:, None] for name, value in inputs.items()}
        return _output(self.run(inputs))

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, of all three int64 inputs."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and runtime file; the tokenizer is saved by itself, as in transformers."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self.folder.resolve():
            shutil.copyfile(self.folder / self.exported.file, folder / self.exported.file)
            write_exported(folder, self.config, self.config.architectures[0], self.exported)


class OnnxModel(RuntimeModel):
    """A model on ONNX Runtime."""

    def set_threads(self, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        # Else its threads go on spinning for a while after a pass, and take the processor from other models.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        file = self.folder / self.exported.file
        try:
            session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_SLOW_FUSION]
            )
        except Exception as error:  # of onnxruntime's C++ code, without a common class
            raise UserError(
                f"{file} cannot be read by ONNX Runtime {onnxruntime.__version__}: {reason(error)}"
            ) from None
        self.threads = threads
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            values = self._session.run(self._outputs, self.feed(inputs))
        except Exception as error:
            shape = tuple(inputs["input_ids"].shape)
            raise RunError(f"ONNX Runtime failed on inputs of shape {shape}: {reason(error)}") from None
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, values, strict=True)}

    def feed(self, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Those of the inputs that the file takes, as ONNX Runtime takes them."""
        return {name: np.ascontiguousarray(inputs[name].long().numpy()) for name in self._inputs}


def load_runtime(folder: str | Path, config: Any, threads: int | None = None) -> RuntimeModel:
    """The model of an exported folder, in eval mode.

    Args:
        config: of transformers, of the folder.
        threads: of its forward passes; None: as many as torch has.

    Raises:
        UserError: the folder is not an exported one, its file is missing or cannot be read, or its runtime
            is not installed.
    """
    exported = read_exported(folder)
    if exported is None:
        raise UserError(f"{folder}: its config.json names no runtime; it is not an exported model")
    file = Path(folder).expanduser() / exported.file
    if not file.is_file():
        raise UserError(f"{folder}: {exported.file}, which its config.json names, is missing")
    try:
        if exported.runtime == "executorch":
            from fastdistil.export.executorch import ExecutorchModel

            return ExecutorchModel(folder, config, exported, threads)
        return OnnxModel(folder, config, exported, threads)
    except ModuleNotFoundError as error:
        raise UserError(f"{folder} needs {exported.runtime}: pip install {exported.runtime}") from error


def _output(values: dict[str, Tensor]) -> Any:
    from transformers.modeling_outputs import (
        BaseModelOutputWithPooling,
        QuestionAnsweringModelOutput,
        SequenceClassifierOutput,
    )

    kinds: dict[str, Any] = {
        "start_logits": QuestionAnsweringModelOutput,
        "logits": SequenceClassifierOutput,
        "last_hidden_state": BaseModelOutputWithPooling,
    }
    kind = next(kind for name, kind in kinds.items() if name in values)
    return kind(**{name: value for name, value in values.items() if name in kind.__dataclass_fields__})
