"""The report's page in a real browser."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastdistil.compare.page import write_page
from fastdistil.compare.results import Comparison, Row

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Visit:
    """An open page, and what it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.route("**/*", self._answer)
        self.file = file
        self.page.goto(file.as_uri())

    def _answer(self, route: Any) -> None:
        if route.request.url == self.file.as_uri():
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def names(self) -> list[str]:
        return self.page.locator("#table tbody tr.row th button").all_inner_texts()

    def xs(self) -> dict[str, float]:
        """Method -> pixels from the left."""
        return self._positions("x")

    def ys(self) -> dict[str, float]:
        return self._positions("y")

    def _positions(self, axis: str) -> dict[str, float]:
        script = """(nodes, axis) => nodes.map((node) => {
            const box = node.querySelector(".hit").getBoundingClientRect();
            return [node.getAttribute("aria-label").split(", ")[0], box[axis]];
        })"""
        return dict(self.page.locator(".point").evaluate_all(script, axis))

    def point(self, method: str) -> Any:
        return self.page.locator(f'.point[aria-label^="{method}, "]')

    def row(self, method: str) -> Any:
        button = self.page.get_by_role("button", name=method, exact=True)
        return self.page.locator("#table tbody tr.row").filter(has=button)


@pytest.fixture(scope="module")
def shared(browser: Any, comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    visit = Visit(browser, write_page(tmp_path_factory.mktemp("page"), comparison))
    yield visit
    visit.context.close()


@pytest.fixture
def visit(shared: Visit) -> Visit:
    """The page as it is at first."""
    shared.page.evaluate("localStorage.clear()")
    shared.page.emulate_media(color_scheme="light")
    shared.page.mouse.move(5, 5)
    shared.page.goto(shared.file.as_uri())
    shared.messages.clear()
    shared.requests.clear()
    return shared


@pytest.fixture
def phone(browser: Any, comparison: Comparison, tmp_path: Path) -> Iterator[Visit]:
    visit = Visit(browser, write_page(tmp_path, comparison), viewport=PHONE, is_mobile=True, has_touch=True)
    yield visit
    visit.context.close()


def values(comparison: Comparison, of) -> dict[str, float]:
    found = {row.method: of(row) for row in comparison.rows}
    return {method: value for method, value in found.items() if value is not None}


def p50(row: Row, case: int) -> float | None:
    return row.timings[case].p50_ms if row.timings else None


ENERGY_UNKNOWN = "distilbert+prune-heads:0.5+prune-ffn:0.5+int8"
COLUMNS = {  # key -> the number it sorts by, and whether more of it is better
    "score": (lambda c, r: r.score, True),
    "retained": (lambda c, r: r.score, True),
    "size": (lambda c, r: r.disk_bytes, False),
    "smaller": (lambda c, r: c.smaller(r), True),
    "parameters": (lambda c, r: r.parameters, False),
    "latency1": (lambda c, r: p50(r, 0), False),
    "faster": (lambda c, r: c.speedup(r), True),
    "latency8": (lambda c, r: p50(r, 1), False),
    "faster8": (lambda c, r: c.speedup(r, 8), True),
    "latency1all": (lambda c, r: p50(r, 2), False),
    "latency8all": (lambda c, r: p50(r, 3), False),
    "throughput": (lambda c, r: r.sequences_per_second, True),
    "peak": (lambda c, r: r.peak_bytes, False),
    "energy": (lambda c, r: r.joules, False),
    "making": (lambda c, r: r.seconds, False),
}


def test_it_asks_for_nothing_and_complains_of_nothing(visit: Visit) -> None:
    page = visit.page
    page.locator("#theme").click()
    page.locator("#axis-x").select_option("size")
    page.locator("#table tbody button").first.click()
    page.locator("#table th button").nth(4).click()
    assert visit.requests == []
    assert visit.messages == []


def test_its_policy_lets_nothing_out(visit: Visit) -> None:
    script = """async () => {
        try { await fetch("https://example.org/"); return "fetched"; } catch { return "refused"; }
    }"""
    assert visit.page.evaluate(script) == "refused"
    assert visit.requests == []  # refused before the request was made
    visit.page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.injected = true";
        document.body.append(script);
    }""")
    assert visit.page.evaluate("window.injected") is None


def test_the_answers_stand_at_the_top_in_words(visit: Visit) -> None:
    first, second = visit.page.locator(".answers li").all_inner_texts()
    assert "To keep 97% of the teacher’s score" in first
    assert "9.6× faster, 10.0× smaller" in first
    assert ENERGY_UNKNOWN in first
    assert "28.2× faster, 54.8× smaller" in second


@pytest.mark.parametrize("key", COLUMNS)
def test_a_column_sorts_by_its_numbers_with_the_unknown_last(
    shared: Visit, comparison: Comparison, key: str
) -> None:
    of, more = COLUMNS[key]
    known = values(comparison, lambda row: of(comparison, row))
    head = shared.page.locator(f'th[data-key="{key}"]')
    for turn in range(2):
        head.get_by_role("button").click()
        down = more != bool(turn)
        assert head.get_attribute("aria-sort") == ("descending" if down else "ascending")
        names = shared.names()
        assert len(names) == len(comparison.rows)
        shown = [known[name] for name in names[: len(known)]]
        expected = sorted(known.values(), reverse=down)
        assert shown == pytest.approx(expected)
        assert not set(names[len(known) :]) & set(known)
        assert "prune-width:0.99" in names[len(known) :]
    assert shared.page.locator('th[aria-sort]:not([aria-sort="none"])').count() == 1


def test_names_sort_as_text(visit: Visit, comparison: Comparison) -> None:
    visit.page.locator('th[data-key="method"] button').press("Enter")
    names = visit.names()
    assert names[:3] == ["bf16", "bilstm", "cluster:4"]
    assert names[-1] == "tinybert-task+factorize-embeddings:64+int8"
    assert sorted(names) == sorted(row.method for row in comparison.rows)


@pytest.mark.parametrize(
    "key", ["latency1", "latency8", "size", "parameters", "peak", "throughput", "energy"]
)
@pytest.mark.parametrize("log", [True, False], ids=["log", "linear"])
def test_points_stand_in_the_order_of_the_chosen_axis(
    shared: Visit, comparison: Comparison, key: str, log: bool
) -> None:
    shared.page.locator("#axis-x").select_option(key)
    shared.page.locator("#log").set_checked(log)
    known = values(comparison, lambda row: COLUMNS[key][0](comparison, row))
    at = shared.xs()
    assert set(at) == set(known)
    by_place = sorted(at, key=lambda method: at[method])
    assert [known[method] for method in by_place] == pytest.approx(sorted(known.values()), rel=1e-3)


@pytest.mark.parametrize("key", ["score", "retained"])
def test_better_scores_stand_higher(shared: Visit, comparison: Comparison, key: str) -> None:
    shared.page.locator("#axis-x").select_option("latency1")
    shared.page.locator("#axis-y").select_option(key)
    known = values(comparison, lambda row: row.score)
    at = shared.ys()
    by_place = sorted(at, key=lambda method: at[method])
    assert [known[method] for method in by_place] == pytest.approx(sorted(known.values(), reverse=True))


@pytest.mark.parametrize("lowest", ["int8-static", "bilstm"], ids=["a broken model", "none is broken"])
def test_the_scale_of_the_scores_is_even(
    browser: Any, comparison: Comparison, tmp_path: Path, lowest: str
) -> None:
    rows = [row for row in comparison.rows if row.method in (lowest, "teacher", "int8", "pkd")]
    visit = Visit(browser, write_page(tmp_path, replace(comparison, rows=rows)))
    script = """() => [...document.querySelectorAll("#plot line.grid")].map((line) =>
        [Number(line.nextElementSibling.textContent), Number(line.getAttribute("y1"))])"""
    marks = visit.page.evaluate(script)
    assert len(marks) > 3
    steps = [(after[0] - before[0], before[1] - after[1]) for before, after in pairwise(marks)]
    assert [pixels for _, pixels in steps] == pytest.approx([steps[0][1]] * len(steps))
    assert [score for score, _ in steps] == pytest.approx([steps[0][0]] * len(steps))
    assert steps[0][1] > 20
    visit.context.close()


def test_log_and_linear_differ_as_they_should(visit: Visit) -> None:
    def middle() -> float:
        """Where int8, at 13.1 ms, stands between 1.71 and 48.6 ms."""
        at = visit.xs()
        low, high = at["tinybert-task+factorize-embeddings:64+int8"], at["prune-movement:0.8"]
        return (at["int8"] - low) / (high - low)

    assert middle() == pytest.approx(0.6085, abs=0.01)  # ln(13.1 / 1.71) / ln(48.6 / 1.71)
    visit.page.locator("#log").uncheck()
    assert middle() == pytest.approx(0.2429, abs=0.01)  # (13.1 - 1.71) / (48.6 - 1.71)


@pytest.mark.parametrize("key", ["latency1", "size", "throughput"])
def test_the_front_goes_through_the_rows_that_no_other_beats(shared: Visit, key: str) -> None:
    shared.page.locator("#axis-x").select_option(key)
    # As in the table: of speed for latency and throughput, of size for size.
    script = """() => {
        const d = document.querySelector("#plot .front").getAttribute("d");
        return d.slice(1).split("L").map((at) => at.split(",").map(Number)).filter((_, i) => i % 2 === 0);
    }"""
    corners = shared.page.evaluate(script)
    box = shared.page.locator("#plot svg").bounding_box()
    at = {name: (x + 14 - box["x"], shared.ys()[name] + 14 - box["y"]) for name, x in shared.xs().items()}
    through = [
        next(name for name, place in at.items() if place == pytest.approx(corner, abs=0.6))
        for corner in corners
    ]
    chain, tiny = ENERGY_UNKNOWN, "tinybert-task+factorize-embeddings:64+int8"
    speed = [tiny, "pkd+int8", chain, "int8", "bf16"]
    assert through == ([tiny, chain, "cluster:4", "int8", "bf16"] if key == "size" else speed)


def test_hovering_a_point_tells_its_numbers(visit: Visit) -> None:
    tip = visit.page.locator("#tip")
    assert tip.is_hidden()
    visit.point("pkd+int8").hover()
    assert tip.is_visible()
    text = tip.inner_text()
    for part in ("pkd+int8", "chain", "89.18 ± 0.29%", "96.5%", "3.42 ms", "14.1× faster", "9.52× smaller"):
        assert part in text
    visit.page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_the_keyboard_walks_the_points(visit: Visit) -> None:
    points = visit.page.locator(".point")
    assert visit.page.locator('.point[tabindex="0"]').count() == 1  # one stop for the tabulator
    visit.page.locator('.point[tabindex="0"]').focus()
    assert points.count() == 20
    visit.page.keyboard.press("ArrowRight")
    label = visit.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("pkd+int8, chain: accuracy 89.18 ± 0.29%, latency, batch 1, one thread 3.42 ms")
    assert "pkd+int8" in visit.page.locator("#tip").inner_text()
    visit.page.keyboard.press("Enter")
    assert visit.row("pkd+int8").get_attribute("aria-current") == "true"


def test_clicking_a_point_marks_its_row(visit: Visit) -> None:
    before = (
        visit.row("bilstm").locator("td").first.evaluate("node => getComputedStyle(node).backgroundColor")
    )
    visit.point("bilstm").click()
    assert visit.row("bilstm").get_attribute("aria-current") == "true"
    visit.page.mouse.move(5, 5)
    after = visit.row("bilstm").locator("td").first.evaluate("node => getComputedStyle(node).backgroundColor")
    assert before != after
    assert "Selected: bilstm, 84.29 ± 0.42%" in visit.page.locator("#selected").inner_text()
    assert visit.page.locator("tr.selected").count() == 1


def test_clicking_a_row_marks_its_point(visit: Visit) -> None:
    visit.row("bilstm").locator("td").nth(2).click()
    assert visit.point("bilstm").get_attribute("aria-pressed") == "true"
    assert visit.page.locator('.point[aria-pressed="true"]').count() == 1
    visit.row("bilstm").locator("td").nth(2).click()  # once more: none
    assert visit.page.locator('.point[aria-pressed="true"]').count() == 0


def test_the_mark_stays_when_the_axis_changes(visit: Visit) -> None:
    visit.point("bilstm").click()
    visit.page.locator("#axis-x").select_option("size")
    assert visit.point("bilstm").get_attribute("aria-pressed") == "true"


def test_an_answer_leads_to_its_row(visit: Visit) -> None:
    visit.page.locator(".answers a").first.click()
    row = visit.row(ENERGY_UNKNOWN)
    assert row.get_attribute("aria-current") == "true"
    assert row.evaluate(
        "node => { const r = node.getBoundingClientRect(); return r.top > 0 && r.bottom < innerHeight; }"
    )


def test_a_class_can_be_left_out_of_plot_and_table(visit: Visit, comparison: Comparison) -> None:
    chains = {row.method for row in comparison.rows if row.kind == "chain"}
    visit.page.get_by_label("chain", exact=True).uncheck()
    assert set(visit.names()) == {row.method for row in comparison.rows} - chains
    assert not chains & set(visit.xs())
    visit.page.get_by_label("chain", exact=True).check()
    assert len(visit.names()) == len(comparison.rows)


def test_a_row_opens_its_command_timings_and_seeds(visit: Visit, comparison: Comparison) -> None:
    button = visit.page.get_by_role("button", name="pkd+int8", exact=True)
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    sheet = visit.page.locator(".sheet")
    row = next(row for row in comparison.rows if row.method == "pkd+int8")
    assert sheet.locator(".command code").inner_text() == row.command
    lines = sheet.locator("table").nth(0).locator("tbody tr").all_inner_texts()
    assert lines[0].split() == ["1", "128", "1", "3.42", "3.62"]
    assert len(lines) == 4
    seeds = sheet.locator("table").nth(1).locator("tbody tr").all_inner_texts()
    assert [line.split() for line in seeds] == [["1", "89.22"], ["2", "88.88"], ["3", "89.45"]]
    button.click()
    assert sheet.is_hidden()


def test_a_failed_row_shows_its_error(visit: Visit) -> None:
    assert "failed: prune-width: 0.99 of a width of 768" in visit.row("prune-width:0.99").inner_text()
    assert "prune-width:0.99" not in visit.xs()


def test_the_copy_button_copies_the_command(visit: Visit, comparison: Comparison) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.get_by_role("button", name="pkd+int8", exact=True).click()
    visit.page.locator(".copy").click()
    playwright.expect(visit.page.locator(".copy")).to_have_text("Copied")
    command = next(row.command for row in comparison.rows if row.method == "pkd+int8")
    assert visit.page.evaluate("navigator.clipboard.readText()") == command


def test_the_copy_button_does_without_the_clipboard_interface(visit: Visit, comparison: Comparison) -> None:
    page = visit.page
    page.evaluate("""() => {
        navigator.clipboard.writeText = () => Promise.reject(new Error("refused"));
        document.execCommand = (name) => { window.copied = [name, document.activeElement.value]; };
    }""")
    page.get_by_role("button", name="pkd+int8", exact=True).click()
    page.locator(".copy").click()
    playwright.expect(page.locator(".copy")).to_have_text("Copied")
    command = next(row.command for row in comparison.rows if row.method == "pkd+int8")
    assert page.evaluate("window.copied") == ["copy", command]
    assert page.locator("textarea").count() == 0


def colours(visit: Visit) -> tuple[str, str]:
    script = "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; }"
    background, ink = visit.page.evaluate(script)
    return background, ink


def test_the_button_turns_light_into_dark_and_back(visit: Visit) -> None:
    light = colours(visit)
    visit.page.get_by_role("button", name="Use dark colours").click()
    dark = colours(visit)
    assert luminance(dark[0]) < 0.05 < luminance(dark[1])
    assert luminance(light[0]) > 0.9
    visit.page.get_by_role("button", name="Use light colours").click()
    assert colours(visit) == light


def test_it_follows_the_system(visit: Visit) -> None:
    visit.page.emulate_media(color_scheme="dark")
    assert luminance(colours(visit)[0]) < 0.05


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of rgb(...)."""
    parts = [float(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "what", ["body", ".summary", "td small", "td.error", ".answers a", "thead button", "#selected"]
)
def test_text_stands_out_as_wcag_aa_asks(shared: Visit, scheme: str, what: str) -> None:
    shared.page.emulate_media(color_scheme=scheme)
    ink = shared.page.locator(what).first.evaluate("node => getComputedStyle(node).color")
    one, other = sorted((luminance(ink), luminance(colours(shared)[0])))
    assert (other + 0.05) / (one + 0.05) >= 4.5


def test_on_a_phone_the_table_scrolls_and_the_page_does_not(phone: Visit) -> None:
    phone.page.locator("#table tbody button").nth(4).click()
    assert phone.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    scroller = phone.page.locator(".scroller")
    assert scroller.evaluate("node => node.scrollWidth > node.clientWidth")
    # Scrolled away, the method still stands at the left.
    scroller.evaluate("node => { node.scrollLeft = 300; }")
    left = phone.page.locator("#table tbody th").first.bounding_box()["x"]
    assert left == pytest.approx(scroller.bounding_box()["x"], abs=1)
    sheet = phone.page.locator(".sheet").bounding_box()
    assert sheet["width"] <= PHONE["width"]


def test_on_a_phone_the_plot_fits(phone: Visit) -> None:
    script = """nodes => nodes.every((node) => {
        const box = node.getBoundingClientRect();
        return box.left >= 0 && box.right <= innerWidth;
    })"""
    assert phone.page.locator("#plot svg text").evaluate_all(script)
    assert len(phone.xs()) == 20


def test_a_name_with_markup_is_text(browser: Any, comparison: Comparison, tmp_path: Path) -> None:
    name = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>\"&'"
    nasty = replace(
        comparison.rows[1], method=name, description=name, command=name, scores=[{"accuracy": 0.92}]
    )
    failed = Row("failed", "pruning", name, error=name)
    changed = replace(
        comparison,
        rows=[comparison.rows[0], nasty, failed],
        teacher=name,
        task=name,
        held_out=name,
        notes=[name],
        machine={name: name},
    )
    visit = Visit(browser, write_page(tmp_path, changed))
    assert visit.names()[1] == name
    assert name in visit.page.locator("h1").inner_text()
    assert name in visit.page.locator(".answers").inner_text()
    visit.page.locator("#table tbody button").nth(1).click()
    assert visit.page.locator(".sheet .command code").inner_text() == name
    visit.page.locator(".answers a").first.click()
    assert name in visit.page.locator("#selected").inner_text()
    assert visit.page.evaluate("window.hurt") is None
    assert visit.page.locator("img").count() == 0
    assert visit.requests == []
    assert visit.messages == []
    visit.context.close()


def test_a_number_that_is_not_finite_is_missing(browser: Any, comparison: Comparison, tmp_path: Path) -> None:
    broken = replace(comparison.rows[1], method="broken", scores=[{"pearson": float("nan")}] * 2)
    visit = Visit(browser, write_page(tmp_path, replace(comparison, rows=[*comparison.rows, broken])))
    assert "broken" not in visit.xs()
    visit.page.locator('th[data-key="score"] button').click()
    assert set(visit.names()[-2:]) == {"broken", "prune-width:0.99"}
    assert visit.messages == []
    visit.context.close()


def test_nothing_measured_is_a_page_too(browser: Any, bare: Comparison, tmp_path: Path) -> None:
    visit = Visit(browser, write_page(tmp_path, bare))
    assert visit.names() == ["teacher", "int8"]
    assert "Nothing to show" in visit.page.locator("#plot").inner_text()
    assert visit.messages == []
    visit.context.close()


def test_columns_that_no_row_has_are_left_out(browser: Any, comparison: Comparison, tmp_path: Path) -> None:
    rows = [replace(row, joules=None) for row in comparison.rows]
    visit = Visit(browser, write_page(tmp_path, replace(comparison, rows=rows)))
    assert visit.page.locator('th[data-key="energy"]').count() == 0
    assert visit.page.locator('th[data-key="peak"]').count() == 1
    assert "energy" not in visit.page.locator("#axis-x option").evaluate_all(
        "nodes => nodes.map((n) => n.value)"
    )
    visit.context.close()


def test_the_data_is_json(comparison: Comparison, tmp_path: Path) -> None:
    text = write_page(tmp_path, comparison).read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [row["method"] for row in data["rows"]][:2] == [
        "teacher",
        "tinybert-task+factorize-embeddings:64+int8",
    ]
