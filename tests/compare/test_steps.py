"""Names of chains become steps, with the options that the user changes."""

from pathlib import Path

import pytest

from fastdistil.compare.steps import parse_chain, parse_chains
from fastdistil.errors import UserError


def test_a_chain_has_a_recipe_and_methods_with_their_values() -> None:
    kd, prune, int8 = parse_chain("kd:3-layers+prune-ffn:0.25+onnx-int8").steps
    assert (kd.name, kd.value, kd.is_recipe, kd.trains) == ("kd", "3-layers", True, True)
    assert prune.method_options().ratio == 0.25  # type: ignore[attr-defined]
    assert prune.recover == {}
    assert (int8.recover, int8.trains) == (None, False)


@pytest.mark.parametrize(
    ("text", "kind", "trains"),
    [
        ("pkd", "distillation", True),
        ("prune-heads", "pruning", True),
        ("int8", "quantisation", False),
        ("onnx", "runtime", False),
        ("kd+int8", "chain", True),
    ],
)
def test_the_kind_of_a_chain(text: str, kind: str, trains: bool) -> None:
    chain = parse_chain(text)
    assert (chain.kind, chain.trains) == (kind, trains)


def test_aliases_stand_for_the_usual_choice() -> None:
    chain = parse_chain("distil+prune+quantize")
    assert [step.name for step in chain.steps] == ["kd", "prune-ffn", "int8"]
    assert chain.name == "distil+prune+quantize"


def test_overrides_reach_the_steps_that_they_name() -> None:
    chain = parse_chain(
        "kd+prune-ffn+prune-heads",
        [
            "kd.run.epochs=2",
            "train.optimizer.lr=1e-4",
            "recover.run.steps=7",
            "3.importance=magnitude",
            "prune-ffn.recover.run.steps=9",
        ],
    )
    kd, ffn, heads = chain.steps
    assert kd.options == {"run.epochs": 2, "optimizer.lr": 1e-4}
    assert ffn.recover == {"optimizer.lr": 1e-4, "run.steps": 9}
    assert heads.recover == {"optimizer.lr": 1e-4, "run.steps": 7}
    assert heads.options == {"importance": "magnitude"}


def test_recovery_can_be_left_out_and_asked_for() -> None:
    chain = parse_chain("prune-ffn+int8", ["prune-ffn.recover=false", "int8.recover=true"])
    assert [step.recover for step in chain.steps] == [None, {}]


def test_a_chain_in_a_file_is_the_one_that_its_name_would_be(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        "steps:\n"
        "  - {method: kd, set: {run.epochs: 3}}\n"
        "  - {method: 'prune-ffn:0.5', set: {importance: magnitude}, recover: {run.steps: 5}}\n"
        "  - {method: int8, recover: false}\n"
    )
    chain = parse_chain(str(file))
    written = parse_chain(
        "kd+prune-ffn:0.5+int8",
        ["kd.run.epochs=3", "prune-ffn.importance=magnitude", "prune-ffn.recover.run.steps=5"],
    )
    assert chain.name == "small"
    assert chain.steps == written.steps


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("prune-fnn", [], r"unknown method 'prune-fnn': did you mean prune-ffn\?"),
        ("quickstart", [], "unknown method 'quickstart'"),
        ("kd:5-layers", [], "recipe kd has the variants 3-layers, alpha-0.2, alpha-0.7, not '5-layers'"),
        ("prune-magnitude:1.0", [], r"prune-magnitude.sparsity: .* less than 1, got 1.0"),
        ("prune-magnitude:-0.1", [], r"prune-magnitude.sparsity: .* 0, got -0.1"),
        ("prune-ffn", ["prune-ffn.ration=0.5"], r"unknown option prune-ffn.ration: did you mean ratio\?"),
        ("prune-ffn", ["prune-heads.ratio=0.5"], "no step called 'prune-heads' takes it"),
        ("int8", ["recover.run.epochs=1"], "no step called 'recover' takes it"),
        ("prune-ffn", ["ratio=0.5"], "an override of a chain reads NAME.KEY=VALUE, got 'ratio=0.5'"),
        ("prune-ffn", ["prune-ffn.recover=3"], "prune-ffn.recover is true, false or a mapping"),
    ],
)
def test_a_mistake_is_told_by_its_name(text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_chain(text, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []\n", "a chain has a list of steps"),
        ("steps: [{set: {a: 1}}]\n", "steps.0 has the keys method, set and recover"),
        ("steps: [{method: kd, sets: {a: 1}}]\n", "steps.0 has the keys method, set and recover"),
    ],
)
def test_a_file_that_is_no_chain(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_chain(str(file))


def test_a_chain_knows_which_overrides_are_for_it() -> None:
    """Those that only together say something, too."""
    overrides = ["int8-embeddings.recover=true", "recover.run.epochs=2", "kd.run.epochs=1"]
    chains = parse_chains(["int8-embeddings", "kd", "onnx"], overrides)
    assert [chain.overrides for chain in chains] == [tuple(overrides[:2]), tuple(overrides[2:]), ()]
    assert parse_chain("int8-embeddings", chains[0].overrides) == chains[0]


def test_an_override_may_be_for_one_chain_of_several() -> None:
    first, second = parse_chains(["kd", "prune-ffn"], ["kd.run.epochs=2"])
    assert first.steps[0].options == {"run.epochs": 2}
    assert second.steps[0].options == {}
    with pytest.raises(UserError, match="no step called 'pkd'"):
        parse_chains(["kd", "prune-ffn"], ["pkd.run.epochs=2"])
    with pytest.raises(UserError, match="method kd is given twice"):
        parse_chains(["kd", "int8", "kd"])
