"""Each recipe for a few steps of the real encoder on real data: SST-2 and Wikipedia.

What is learned in two steps is nothing. That the loss and each of its terms are numbers, and that the model
that is written is one that loads and scores, is what a recipe must do before it is run for hours.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdistil.recipes import list_recipes
from fastdistil.train.config import load_config

SHARED = Path(__file__).parents[3] / "shared"
ENCODER = SHARED / "models" / "encoder-12x384"
SST2 = SHARED / "data" / "glue" / "sst2"
WIKITEXT = SHARED / "data" / "text" / "wikitext2_raw" / "train.parquet"

pytestmark = [
    pytest.mark.skipif(
        not all(path.exists() for path in (ENCODER, SST2, WIKITEXT)),
        reason="the real encoder and the real data are not beside the repository",
    ),
    pytest.mark.slow,
]
pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")


@dataclass(frozen=True)
class Case:
    """How a recipe is run here, and what it must do."""

    auto: str  # the class of `transformers` that reads its model
    terms: dict[str, set[str]]  # phase -> terms of its loss
    keys: tuple[str, ...] = ()
    teacher: str | None = "finetuned"  # which fixture: finetuned, pretrained or encoder
    student: str = "student"  # its folder


CLASSIFIER = "AutoModelForSequenceClassification"
TWO_LAYERS = ("student.num_layers=2", "student.teacher_layers=null")
TINYBERT = {"attention", "hidden", "embeddings"}
FEATURES = {"feature_maps", "feature_mean", "feature_variance", "attention"}
CASES = {
    "bert": Case(
        "AutoModelForPreTraining",
        {"model": {"ce", "next_sentence"}},
        ("student.num_layers=2",),
        teacher="encoder",
        student="model",
    ),
    "bilstm": Case(CLASSIFIER, {"student": {"kd"}}, ("augment.copies=2", "baseline=false")),
    "distilbert": Case(
        "AutoModelForMaskedLM", {"student": {"kd", "ce", "cosine"}}, TWO_LAYERS, teacher="pretrained"
    ),
    "distilbert-task": Case(
        CLASSIFIER,
        {"student": {"kd", "task"}},
        (
            "student.num_layers=2",
            "student.architecture=distilbert",
            f"student.from_model={ENCODER}",
            "baseline=false",
        ),
    ),
    "finetune": Case(
        CLASSIFIER, {"model": {"task"}}, ("student.num_layers=2",), teacher="encoder", student="model"
    ),
    "kd": Case(CLASSIFIER, {"student": {"kd", "task"}, "baseline": {"task"}}, TWO_LAYERS),
    "minilm": Case(
        "AutoModel",
        {"student": {"query_relation", "key_relation", "value_relation"}},
        TWO_LAYERS,
        teacher="encoder",
    ),
    "mlm": Case(
        "AutoModelForMaskedLM",
        {"head": {"ce"}, "model": {"ce"}},
        ("student.num_layers=2", "run.head_warmup_steps=1"),
        teacher="encoder",
        student="model",
    ),
    "mobilebert": Case(
        "AutoModelForMaskedLM",
        {"transfer-layer-1": FEATURES, "transfer": FEATURES, "student": {"kd", "ce"}},
        ("student.num_layers=2", "stages.0.run.steps=2"),
        teacher="pretrained",
    ),
    "pkd": Case(CLASSIFIER, {"student": {"kd", "task", "hidden"}}, (*TWO_LAYERS, "baseline=false")),
    "quickstart": Case(
        "AutoModelForMaskedLM",
        {"teacher": {"ce"}, "student": {"kd", "ce", "cosine"}, "baseline": {"ce"}},
        ("new_teacher.steps=2", "data.vocab_size=600"),
        teacher=None,
    ),
    "recover": Case(CLASSIFIER, {"student": {"kd", "task"}}, TWO_LAYERS),
    "tinybert-general": Case("AutoModel", {"student": TINYBERT}, TWO_LAYERS, teacher="encoder"),
    "tinybert-task": Case(
        CLASSIFIER,
        {"intermediate": TINYBERT, "student": {"kd"}},
        (
            *TWO_LAYERS,
            "augment.copies=2",
            "stages.0.run.steps=2",
            "stages.1.run.steps=2",
            "baseline=false",
        ),
    ),
}
KEYS = (
    "data.max_length=32",
    "data.max_sequences=60",
    "data.validation_fraction=0.2",
    "run.steps=2",
    "run.batch_size=4",
    "run.micro_batch_size=null",
    "run.eval_every=100",
    "run.eval_sequences=4",
    "run.log_every=1",
    # Of a process, and so of all tests: accelerate keeps it. The teacher's may be another.
    "run.precision=fp32",
)


@dataclass
class Real:
    """Slices of the real data, and the teachers that are made of the real encoder."""

    root: Path
    keys: list[str]
    teachers: dict[str, Path] = field(default_factory=dict)

    def teacher(self, name: str) -> Path:
        if name not in self.teachers:
            self.teachers[name] = {"finetuned": self._finetuned, "pretrained": self._pretrained}[name]()
        return self.teachers[name]

    def _finetuned(self) -> Path:
        from fastdistil.train.run import run

        output = self.root / "finetuned"
        files = {"task": "sst2", "data": str(self.root), "output": output}
        run(load_config("finetune", [*self.keys, "task.max_length=32"], teacher=str(ENCODER), **files))
        return output / "model"

    def _pretrained(self) -> Path:
        """With a fresh masked-language-model head: none comes with the encoder."""
        from fastdistil.models.load import load_encoder_with_new_head

        torch.manual_seed(0)
        folder = self.root / "pretrained"
        for part in load_encoder_with_new_head(ENCODER):
            part.save_pretrained(str(folder))
        return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    import fastdistil.train.report

    root = tmp_path_factory.mktemp("real")
    (root / "sst2").mkdir()
    for split, rows in (("train", 64), ("validation", 32)):
        table = parquet.read_table(SST2 / f"{split}.parquet").slice(0, rows)
        parquet.write_table(table, root / "sst2" / f"{split}.parquet")
    parquet.write_table(parquet.read_table(WIKITEXT).slice(0, 400), root / "text.parquet")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        # Not what is tested here, and 33 passes of the teacher.
        quick = partial(fastdistil.train.report.measure_latency, runs=1, warmup=0)
        patch.setattr(fastdistil.train.report, "measure_latency", quick)
        torch.set_num_threads(1)
        yield Real(root, [*KEYS, f"data.cache_dir={root / 'cache'}"])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
def test_real_steps(real: Real, tmp_path: Path, name: str) -> None:
    import transformers

    from fastdistil.train.logging import METRICS, read_metrics
    from fastdistil.train.run import run

    assert name in CASES, f"recipe {name} has no steps on real data here: add them"
    case = CASES[name]
    keys = [*real.keys, *case.keys]
    if name == "tinybert-task":
        keys.append(f"augment.masked_lm={real.teacher('pretrained')}")
    files = {"output": tmp_path / "run"}
    if case.teacher is not None:
        files["teacher"] = str(ENCODER if case.teacher == "encoder" else real.teacher(case.teacher))
    if case.auto == CLASSIFIER:
        keys += ["task.max_length=32", "task.max_examples=16", "allow_weak_teacher=true"]
        files |= {"task": "sst2", "data": str(real.root)}
    else:
        files["corpus"] = str(real.root / "text.parquet")
    config = load_config(name, keys, **files)
    result = run(config)

    records = [r for r in read_metrics(result.output / METRICS) if "loss" in r]
    found: dict[str, set[str]] = {}
    for r in records:
        terms = r.keys() - {"phase", "step", "loss", "lr", "tokens", "seconds", "tokens_per_s"}
        # What is not finite is written as null.
        assert None not in [r[term] for term in ("loss", *terms)], r
        found[r["phase"]] = terms
    assert found == case.terms
    steps = {phase: [r["step"] for r in records if r["phase"] == phase] for phase in found}
    assert all(numbers == [1, 2] for phase, numbers in steps.items() if phase != "head")

    folder = result.output / case.student
    model, info = getattr(transformers, case.auto).from_pretrained(folder, output_loading_info=True)
    # An encoder alone has no pooler, with which AutoModel begins all the same.
    assert not [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        output = model.eval()(**tokenizer("a good film", return_tensors="pt"))
    assert all(value.isfinite().all() for value in output.values() if torch.is_tensor(value))
    for m in json.loads((result.output / "results.json").read_text())["models"]:
        assert all(math.isfinite(score) for score in m["scores"].values())
    assert result.models[-1].scores
