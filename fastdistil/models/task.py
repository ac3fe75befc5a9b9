"""Load a model with the head of a task, and its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdistil.errors import UserError
from fastdistil.models.load import (
    check_encoder,
    common_prefix,
    head_keys,
    load_fitting_tokenizer,
    load_model,
    load_model_config,
)

if TYPE_CHECKING:
    from fastdistil.data.tasks import Task

# The class of `transformers` that reads the head of each kind of task.
_AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "span": "AutoModelForQuestionAnswering",
    "choice": "AutoModelForMultipleChoice",
}
_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}


def load_task_model(
    source: str | Path, task: "Task", *, new_head: bool, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """`(model, tokenizer)` for a task, in eval mode.

    The model is the one that `transformers` has for sequence classification (also of regression, with one
    output), question answering (spans) or multiple choice, with the task's labels in its config. If a trained
    head's config names the same labels in another order, its outputs are put into the task's.

    Args:
        source: a `transformers` folder, or a model name on the hub, of an encoder with any head or none; or
            the folder of a compressed model, which has its head, and its precision, already.
        task: what the head is for.
        new_head: whether a head that the folder lacks, or has for another number of labels, starts fresh, as
            `transformers` initialises it, from torch's global random state. That is pooler and classifier,
            each where it lacks. A head that fits is kept.
        dtype: of the loaded weights, whatever the file has.

    Raises:
        UserError: the folder does not exist or is not a model folder, has no safetensors weights, lacks
            weights of the encoder, has no tokenizer that fits the model, or, without `new_head`, no trained
            head for the task (the message names it and the command that trains one); a BiLSTM is for the
            other kind of texts, single or paired; the hub cannot be reached; the family has no such head.
    """
    import transformers

    import fastdistil.models.bilstm  # noqa: F401  registers it with the Auto classes
    from fastdistil.compress.store import is_compressed, load

    names = _output_names(task)
    if is_compressed(source):
        model = load(source)
        if [str(model.config.id2label[i]) for i in range(model.config.num_labels)] != [*names]:
            raise UserError(
                f"{source}: was compressed with a head that is not for {task.name}: compress a model that is "
                "fine-tuned on it"
            )
        return model, load_fitting_tokenizer(source, model, masks=False)
    kind = f"a model for {task.kind}"
    # Not by keywords of `from_pretrained`: it refuses one label of a config that is of a classification.
    config = load_model_config(source, kind)
    config.problem_type = _PROBLEMS.get(task.kind)
    if config.num_labels != len(names):
        config.num_labels = len(names)
    model, info = load_model(
        source,
        dtype,
        getattr(transformers, _AUTO[task.kind]),
        kind,
        config=config,
        ignore_mismatched_sizes=True,  # of a head for another number of labels; others are refused below
    )
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if key.startswith(f"{model.base_model_prefix}.pooler.")}
    head = head_keys(model, missing) or sorted(pooler)
    check_encoder(source, model, missing - pooler - set(head))
    resized = {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in info["mismatched_keys"]}
    for key in sorted(resized.keys() - set(head_keys(model, resized))):
        theirs, ours = resized[key]
        raise UserError(f"{source}: {key!r} is {theirs} in the file, but its config makes it {ours}")
    if head or resized:
        if not new_head:
            raise _no_head(source, task, model, head, resized)
    else:
        _sort_outputs(model, names)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    _check_pairs(source, task, model)
    return model, load_fitting_tokenizer(source, model, masks=False)


def _output_names(task: "Task") -> tuple[str, ...]:
    # Regression has one output; so has a choice, which is made among the scores of all its options.
    return {"classification": task.labels, "span": ("start", "end")}.get(task.kind, ("score",))


def _sort_outputs(model: Any, names: tuple[str, ...]) -> None:
    """Put the outputs of a head that knows its labels by name into the task's order.

    Models for MNLI come with its three classes in several orders.
    """
    theirs = [str(model.config.id2label[i]).lower() for i in range(len(names))]
    ours = [name.lower() for name in names]
    if theirs == ours or sorted(theirs) != sorted(ours):
        return
    order = [theirs.index(name) for name in ours]
    encoder = set(model.base_model.modules())
    output = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in encoder][-1]
    with torch.no_grad():
        for parameter in output.parameters():
            parameter.copy_(parameter[order])


def _no_head(
    source: str | Path,
    task: "Task",
    model: Any,
    missing: list[str],
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> UserError:
    if missing:
        kind = type(model).__name__
        problem = f"no trained head for {task.name} ({common_prefix(missing)!r} of {kind} is missing)"
    else:
        theirs, ours = next(iter(resized.values()))
        name = common_prefix(sorted(resized))
        problem = f"its head {name!r} is of size {theirs[0]}, but {task.name} needs {ours[0]}"
    command = f"fastdistil train finetune --teacher {source} --task {task.argument}"
    return UserError(f"{source}: {problem}; fine-tune one first: {command}")


def _check_pairs(source: str | Path, task: "Task", model: Any) -> None:
    """A BiLSTM compares two sentences or none; what its head reads would be of another width."""
    pairs = len(task.columns) == 2
    if getattr(model.config, "pairs", pairs) != pairs:
        kinds = {False: "single sentences", True: "pairs of sentences"}
        raise UserError(f"{source}: is for {kinds[not pairs]}, but {task.name} has {kinds[pairs]}")
