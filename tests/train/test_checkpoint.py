import errno
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM
from transformers.utils.logging import enable_progress_bar

from fastdistil.errors import RunError
from fastdistil.train import checkpoint
from fastdistil.train.checkpoint import (
    Progress,
    load_checkpoint,
    load_projections,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    save_model,
)


class Training:
    """A tiny model that takes steps with dropout, and a projection of its hidden states beside it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = BertForMaskedLM(
            BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, max_position_embeddings=16)
        ).train()  # fmt: skip
        self.projections = torch.nn.ModuleList([torch.nn.Linear(16, 5)])
        learned = [*self.model.parameters(), *self.projections.parameters()]
        self.optimizer = torch.optim.AdamW(learned, lr=0.01, fused=True)
        self.accelerator = Accelerator(cpu=True)
        self.progress = Progress()

    def steps(self, count: int) -> None:
        for _ in range(count):
            ids = torch.arange(24).view(2, 12)
            output = self.model(input_ids=ids, labels=ids, output_hidden_states=True)
            (output.loss + self.projections[0](output.hidden_states[0]).square().mean()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.step += 1

    def save(self, root: Path, keep: int = 2) -> None:
        save_checkpoint(
            root,
            self.model,
            self.projections,
            self.optimizer,
            self.progress,
            rng=rng_state(torch.device("cpu")),
            data={"at": self.progress.step},
            accelerator=self.accelerator,
            fingerprint="f",
            keep=keep,
        )

    def load(self, folder: Path) -> dict[str, Any]:
        self.progress, data = load_checkpoint(
            folder, self.model, self.projections, self.optimizer, self.accelerator
        )
        return data


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    first = Training(0)
    first.steps(3)
    first.progress.tokens = 99
    first.save(tmp_path)
    first.steps(3)

    second = Training(1)
    second.steps(1)
    data = second.load(newest_checkpoint(tmp_path, "f"))
    assert (second.progress, data) == (Progress(3, 99, 0.0), {"at": 3})
    second.steps(3)
    for part in ("model", "projections"):
        ours, theirs = getattr(first, part), getattr(second, part)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_what_the_objectives_learned_is_read_from_the_newest_checkpoint(tmp_path):
    training = Training(0)
    for _ in range(2):
        training.steps(1)
        training.save(tmp_path)
    fresh = torch.nn.ModuleList([torch.nn.Linear(16, 5)])
    load_projections(fresh, tmp_path, "f")
    assert torch.equal(fresh[0].weight, training.projections[0].weight)
    load_projections(torch.nn.ModuleList(), tmp_path / "nowhere", "f")  # nothing learned, nothing read
    with pytest.raises(RunError, match="the checkpoints are gone"):
        load_projections(fresh, tmp_path / "nowhere", "f")


def test_a_checkpoint_is_a_transformers_folder_without_pickles(tmp_path, monkeypatch):
    training = Training(0)
    training.steps(1)
    monkeypatch.setattr(pickle, "dumps", None)
    monkeypatch.setattr(torch, "save", None)
    training.save(tmp_path)
    folder = tmp_path / "checkpoint-1"
    weights = {"model.safetensors", "projections.safetensors", "optimizer.safetensors", "rng-0.safetensors"}
    names = {"config.json", "state.json", *weights}
    assert {file.name for file in folder.iterdir()} == names
    assert set(json.loads((folder / "state.json").read_text())["sha256"]) == names - {"state.json"}
    model, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for a, b in zip(model.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_is_saved_without_progress_bars(tmp_path, capfd):
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    enable_progress_bar()
    Training(0).model.save_pretrained(tmp_path / "plain")
    assert "100%" in capfd.readouterr().err  # what transformers does by itself
    save_model(Training(0).model, Tokenizer(), tmp_path / "model")
    assert capfd.readouterr().err == ""
    assert {file.name for file in (tmp_path / "model").iterdir()} >= {"model.safetensors", "tokenizer.json"}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


_FILES = ["model.safetensors", "projections.safetensors", "optimizer.safetensors", "rng-0.safetensors"]
_DAMAGES = [(name, damage) for damage in (_cut, Path.unlink, _flip) for name in _FILES]


@pytest.mark.parametrize(("name", "damage"), [*_DAMAGES, ("state.json", _cut), ("state.json", Path.unlink)])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    training = Training(0)
    for _ in range(2):
        training.steps(1)
        training.save(tmp_path)
    damage(tmp_path / "checkpoint-2" / name)
    assert newest_checkpoint(tmp_path, "f") == tmp_path / "checkpoint-1"


def test_leftovers_and_other_runs_are_no_checkpoints_and_old_ones_go(tmp_path):
    (tmp_path / ".writing-checkpoint-9").mkdir()
    (tmp_path / "checkpoint-8").mkdir()
    assert newest_checkpoint(tmp_path, "f") is None
    (tmp_path / "checkpoint-8").rmdir()
    training = Training(0)
    for _ in range(3):
        training.steps(1)
        training.save(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert newest_checkpoint(tmp_path, "f") == tmp_path / "checkpoint-3"
    assert newest_checkpoint(tmp_path, "another run") is None


def test_a_checkpoint_that_does_not_verify_takes_no_place_of_one_that_does(tmp_path):
    training = Training(0)
    for _ in range(2):
        training.steps(2)
        training.save(tmp_path, keep=1)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-9")  # damaged: its state says step 4
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"torn")
    training.steps(1)
    training.save(tmp_path, keep=1)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert newest_checkpoint(tmp_path, "f") == tmp_path / "checkpoint-5"


def test_a_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    training = Training(0)
    training.steps(1)
    training.save(tmp_path, keep=1)
    write = checkpoint.write_durably

    def full(file: Path, content: bytes) -> None:
        if file.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        write(file, content)

    monkeypatch.setattr(checkpoint, "write_durably", full)
    training.steps(1)
    with pytest.raises(RunError) as error:
        training.save(tmp_path, keep=1)
    expected = (
        f"cannot save {tmp_path}/checkpoint-2: No space left on device; earlier checkpoints are untouched"
    )
    assert str(error.value) == expected
    assert newest_checkpoint(tmp_path, "f") == tmp_path / "checkpoint-1"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
