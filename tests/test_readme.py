"""The README's Python runs as it stands, and its commands are ones that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
# Of tasks that the README writes down: the name of the file, in its first line, and what is in it.
OWN_TASKS = dict(re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
COMMANDS = [line for line in SHELL.splitlines() if line.startswith("fastdistil ")]


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_example_gives_a_finite_loss_and_gradients(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    loss, hidden, head = names["loss"], names["student_hidden"], names["student_head"]
    assert 0 < loss.item() < 1000  # type: ignore[attr-defined]
    assert hidden.grad.abs().sum() > 0  # type: ignore[attr-defined]
    assert head.grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_one_that_there_is(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options, and what they name: recipe, keys, task, methods. Nothing is run."""
    monkeypatch.chdir(tmp_path)
    typer = pytest.importorskip("typer")
    from fastdistil.cli import app
    from fastdistil.cli.app import Invocation
    from fastdistil.compare.steps import parse_chains
    from fastdistil.train.config import load_config

    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    given = command.make_context(name, arguments, obj=Invocation([])).params
    if name == "train":
        files = {key: given[key] for key in ("teacher", "corpus", "task", "data")}
        if (task := files["task"]) and task in OWN_TASKS:
            Path(task).write_text(OWN_TASKS[task])
        load_config(given["recipe"], given["overrides"] or (), **files)
    methods = given.get("methods") or given.get("method")
    if methods:
        assert parse_chains(methods.split(","), given["overrides"] or ())


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15
    assert not re.search(r"^fastdistil [^'\n]*\*", SHELL, re.MULTILINE), "a shell would expand this"
