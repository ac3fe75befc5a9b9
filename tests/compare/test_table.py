"""The answers, the Markdown and the console's table."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from fastdistil.compare.quantities import ENERGY, LATENCY, PEAK, SIZE, THROUGHPUT, front, number, ordered
from fastdistil.compare.results import Comparison, Row, Timing
from fastdistil.compare.table import answers, console_table, markdown, marks, sentence


def cells(text: str, table: int) -> dict[str, dict[str, str]]:
    """Method -> column -> cell of the Markdown's table of that number."""
    blocks = [block for block in text.split("\n\n") if block.startswith("| method")]
    # A bar that is escaped does not end a cell.
    lines = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in blocks[table].splitlines()]
    columns = lines[0]
    assert all(len(line) == len(columns) for line in lines)
    return {line[0].strip("`"): dict(zip(columns, line, strict=True)) for line in lines[2:]}


def only(comparison: Comparison, *methods: str) -> Comparison:
    return replace(comparison, rows=[row for row in comparison.rows if row.method in ("teacher", *methods)])


def test_the_answer_is_the_fastest_that_keeps_enough(comparison: Comparison) -> None:
    best, good = answers(comparison)
    assert (best.level, good.level) == (0.97, 0.93)
    assert best.fastest is not None
    assert best.fastest.method == "distilbert+prune-heads:0.5+prune-ffn:0.5+int8"
    assert good.fastest is not None
    assert good.fastest.method == "tinybert-task+factorize-embeddings:64+int8"


def test_an_answer_in_words(comparison: Comparison) -> None:
    text = sentence(comparison, answers(comparison)[0])
    assert text == (
        "Keeping at least 97% of the teacher's score, distilbert+prune-heads:0.5+prune-ffn:0.5+int8 is the "
        "fastest and smallest: 9.6× faster, 10.0× smaller."
    )


def test_an_answer_names_the_smallest_where_it_is_another(comparison: Comparison) -> None:
    text = sentence(comparison, answers(only(comparison, "int8", "cluster:4"))[0])
    assert text == (
        "Keeping at least 97% of the teacher's score, int8 is the fastest: 3.7× faster, 3.9× smaller. "
        "The smallest is cluster:4: 7.2× smaller, 1.0× slower."
    )


def test_an_answer_names_the_nearest_where_nothing_keeps_enough(comparison: Comparison) -> None:
    text = sentence(comparison, answers(only(comparison, "pkd", "bilstm"))[0])
    assert text == "No method keeps 97% of the teacher's score; pkd is the nearest, with 96.6%."


def test_a_failed_row_is_no_answer(comparison: Comparison) -> None:
    chosen = only(comparison, "int8", "bf16")
    failed = [replace(row, error="it broke") if row.method == "int8" else row for row in chosen.rows]
    fastest = answers(replace(chosen, rows=failed))[0].fastest
    assert fastest is not None
    assert fastest.method == "bf16"


def test_without_measurements_the_answer_says_so(bare: Comparison) -> None:
    assert (
        sentence(bare, answers(bare)[1]) == "Nothing was measured that could keep 93% of the teacher's score."
    )


def test_fronts(comparison: Comparison) -> None:
    tiny = "tinybert-task+factorize-embeddings:64+int8"
    chain = "distilbert+prune-heads:0.5+prune-ffn:0.5+int8"
    assert [row.method for row in front(comparison, LATENCY)] == [tiny, "pkd+int8", chain, "int8", "bf16"]
    assert [row.method for row in front(comparison, SIZE)] == [tiny, chain, "cluster:4", "int8", "bf16"]
    assert marks(comparison) == {
        tiny: "speed, size",
        chain: "speed, size",
        "pkd+int8": "speed",
        "cluster:4": "size",
        "int8": "speed, size",
        "bf16": "speed, size",
    }


def test_the_front_of_throughput_prefers_more(comparison: Comparison) -> None:
    assert front(comparison, THROUGHPUT) == front(comparison, LATENCY)


def test_a_score_that_is_not_finite_is_on_no_front(comparison: Comparison) -> None:
    broken = Row(
        "nan", "chain", "", scores=[{"pearson": float("nan")}], timings=[Timing(1, 128, 1, 0.1, 0.1)]
    )
    assert front(replace(comparison, rows=[*comparison.rows, broken]), LATENCY) == front(comparison, LATENCY)


def test_quality_cells(comparison: Comparison) -> None:
    table = cells(markdown(comparison), 0)
    assert table["pkd+int8"] == {
        "method": "`pkd+int8`",
        "class": "chain",
        "accuracy, %": "89.18 ± 0.29",
        "retained, %": "96.5",
        "MB": "46.0",
        "smaller, ×": "9.52",
        "latency, ms": "3.42",
        "speed-up, ×": "14.1",
        "Pareto": "speed",
        "command": "[3](#command-3)",
    }
    assert table["int8"]["accuracy, %"] == "92.09"  # one seed, no deviation


def test_cost_cells(comparison: Comparison) -> None:
    table = cells(markdown(comparison), 1)
    assert table["pkd+int8"] == {
        "method": "`pkd+int8`",
        "parameters, M": "45.1",
        "batch 1, one thread": "3.42 / 3.62",
        "batch 8, one thread": "26.0 / 27.6",
        "batch 1, all": "1.98 / 2.10",
        "batch 8, all": "14.0 / 14.9",
        "batch 8 speed-up, ×": "14.1",
        "sequences/s": "570",
        "peak, MB": "130",
        "energy, mJ": "95.0",
        "time to make, s": "412",
    }
    assert table["distilbert+prune-heads:0.5+prune-ffn:0.5+int8"]["energy, mJ"] == "–"


def test_energy_is_left_out_where_the_machine_cannot_tell(comparison: Comparison) -> None:
    silent = replace(comparison, rows=[replace(row, joules=None) for row in comparison.rows])
    assert "energy, mJ" not in cells(markdown(silent), 1)["teacher"]


def test_every_row_links_the_command_that_makes_it(comparison: Comparison) -> None:
    text = markdown(comparison)
    table = cells(text, 0)
    assert len(table) == len(comparison.rows)
    for row in comparison.rows:
        link = re.fullmatch(r"\[\d+\]\(#(command-\d+)\)", table[row.method]["command"])
        assert link is not None
        item = text.split(f'<a id="{link[1]}"></a>')[1]
        assert item.split("```sh\n")[1].split("\n")[0].strip() == row.command


def test_a_failed_row_stands_in_the_table_with_its_error(comparison: Comparison) -> None:
    text = markdown(comparison)
    row = cells(text, 0)["prune-width:0.99"]
    assert row["accuracy, %"] == "failed"
    assert row["MB"] == row["speed-up, ×"] == "–"
    assert "- `prune-width:0.99` failed: prune-width: 0.99 of a width of 768 leaves 8" in text
    assert "prune-width:0.99" not in cells(text, 1)


def test_the_teacher_is_first_then_the_fastest_and_failures_are_last(comparison: Comparison) -> None:
    rows = ordered(comparison)
    assert rows[0].kind == "teacher"
    assert rows[-1].error is not None
    latencies = [row.timings[0].p50_ms for row in rows[1:-1]]
    assert latencies == sorted(latencies)


def test_a_bar_or_a_tag_in_a_name_stays_inside_its_cell(comparison: Comparison) -> None:
    odd = replace(comparison.rows[1], method="a|b<i>\n", error="it\nsaid <b>|")
    text = markdown(replace(comparison, rows=[comparison.rows[0], odd]))
    assert cells(text, 0)["a\\|b<i>"]["accuracy, %"] == "failed"
    assert "failed: it said &lt;b>\\|\n" in text


def test_two_metrics_are_named_as_their_mean(bare: Comparison) -> None:
    assert cells(markdown(bare), 0)["teacher"]["mean of accuracy and F1, %"] == "85.00"


@pytest.mark.parametrize(
    ("value", "text"), [(0.514, "0.51"), (9.951, "9.95"), (48.21, "48.2"), (366.4, "366"), (1310.0, "1,310")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_units(comparison: Comparison) -> None:
    row = comparison.rows[1]
    assert SIZE.value(comparison, row) == 268
    assert PEAK.value(comparison, row) == 431
    assert ENERGY.value(comparison, row) == pytest.approx(660)


def test_console_table(comparison: Comparison) -> None:
    odd = replace(comparison.rows[1], method="[red]x[/red]")  # rich's markup must stay text
    console = Console(file=io.StringIO(), width=120)
    console.print(console_table(replace(comparison, rows=[*comparison.rows, odd])))
    lines = [re.split(r"\s{2,}| (?=\d)", line.strip()) for line in console.file.getvalue().splitlines()]
    rows = {line[0].strip(): line[1:] for line in lines}
    assert rows["pkd+int8"] == ["89.18 ±", "0.29", "96.5", "46.0", "9.52", "3.42", "14.1 speed"]
    assert rows["prune-width:0.99"] == ["failed"]
    assert "[red]x[/red]" in rows
