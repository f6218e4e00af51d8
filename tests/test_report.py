"""report.html in a real browser, with 500 dialogues and text that would like to be markup; the console, report.md."""

import contextlib
import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import DIALOGSUM, make_rows, read_jsonl, run_script, write_rows
from helpers import start

import evaluate_rouge
from utils.config import EvaluationConfig, UserError
from utils.scoring.html_report import build_page, collect_data, escape_json
from utils.scoring.metrics.rouge import METRICS, compare_models
from utils.scoring.report import format_markdown, format_table, read_results
from utils.scoring.results import read_training
from utils.scoring.tables import Table, build_differences, build_tables, build_unsupported, describe_differences

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> <!-- {{data}} &lt;"
)
MODELS = ["base", "<b>tuned</b>", "other"]


@pytest.fixture(scope="module")
def report(make_once):
    """A folder with 500 dialogues, of three references each, and three systems' texts, scored by the script."""
    return make_once("report", fill_report)


def fill_report(folder: Path):
    rows = [
        {"id": f"d{index}_{number}", "dialogue": row["dialogue"], "summary": f"{' '.join(words[::number])} {number}"}
        for index, row in enumerate(make_rows(500))
        for words in [row["summary"].split()]
        for number in (1, 2, 3)
    ]
    for row in rows[9:12]:
        row["dialogue"] = f"#Person1#: {HOSTILE}\n#Person2#: Yes."
        row["summary"] = f"{HOSTILE} {row['id']}"
    write_rows(folder / "test.jsonl", rows)
    texts = {
        MODELS[0]: [" ".join(row["dialogue"].split()[:6]) for row in rows],
        MODELS[1]: [row["summary"].rsplit(" ", 1)[0] for row in rows],
        MODELS[2]: ["" if index < 3 else row["summary"].split()[0] for index, row in enumerate(rows)],
    }
    texts[MODELS[0]][9] = HOSTILE
    for name, of_model in texts.items():
        lines = [
            {"id": row["id"], "prediction": text, "truncated": False}
            for row, text in zip(rows[::3], of_model[::3], strict=True)
        ]
        write_rows(folder / f"texts{MODELS.index(name)}.jsonl", lines)
    files = [f"{name}={folder / f'texts{index}.jsonl'}" for index, name in enumerate(MODELS)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        start(
            "evaluate_rouge", "--test_file", folder / "test.jsonl", "--output_dir", folder / "out",
            "--example_index", 9, "--predictions_file", *files,
        )  # fmt: skip
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def wait_for(page, expression: str):
    """As page.wait_for_function, whose polling needs the eval that the report's policy forbids."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"it never came to be: {expression}")


@pytest.fixture
def open_page(browser):
    """Opens a report; what the console says and what is asked of the network is an error at the end of the test."""
    said, pages = [], []

    def start(path, **settings):
        page = browser.new_page(**settings)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or said.append(request.url))
        page.goto(f"file://{path}")
        if settings.get("java_script_enabled", True):
            wait_for(page, "document.querySelectorAll('.chart svg').length >= 3")
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()
    assert said == []


def read_column(page, column: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#table tbody tr:not(.detail) td:nth-child({column})", "cells => cells.map(cell => cell.textContent)"
    )


def expected_changes(report, a: str, b: str, metric: str = "rouge1") -> dict[str, float]:
    """Points of A minus B for each dialogue, from predictions.jsonl, the mean of the references."""
    scores = {
        (line["model"], line["id"]): sum(line["scores"][metric]) / 3 * 100
        for line in read_jsonl(report / "out" / "predictions.jsonl")
    }
    return {row_id: scores[a, row_id] - value for (name, row_id), value in scores.items() if name == b}


@pytest.mark.slow
def test_it_opens_and_holds_what_was_scored(report, open_page):
    page = open_page(report / "out" / "report.html")
    results = json.loads((report / "out" / "results.json").read_text(encoding="utf-8"))
    for name, entry in results["models"].items():
        value = f"{100 * entry['scores']['max']['rougeL']['value']:.2f}"
        row = page.locator("section:first-of-type tr").filter(has_text=name).filter(has_text="max").first
        assert value in row.inner_text()
    assert page.locator(".conclusions li").all_inner_texts() == results["conclusions"]
    assert page.locator("#forest svg").count() == page.locator("#by_length svg").count() == 1
    assert page.locator("#curves_figure").is_hidden(), "nothing was trained"
    assert "500 dialogues" in page.locator("header p").inner_text()


def test_text_of_the_data_is_never_markup(report, open_page):
    page = open_page(report / "out" / "report.html")
    assert page.title() == "Summaries scored with ROUGE"
    page.fill("#search", "d3_1")
    page.get_by_role("button", name="d3_1").click()
    detail = page.locator("tr.detail").last
    assert HOSTILE in detail.locator(".source").inner_text()
    assert detail.locator(".text").first.inner_text() == HOSTILE
    assert page.locator("img").count() == page.locator("main script").count() == page.locator("td b").count() == 0
    assert HOSTILE in page.locator("dl").first.inner_text(), "the sample"
    assert page.title() == "Summaries scored with ROUGE"


@pytest.mark.slow
def test_sorting(report, open_page):
    """The largest changes first, for better or worse; then by any column, both ways; by keyboard."""
    page = open_page(report / "out" / "report.html")
    assert page.locator("#pair option").first.inner_text() == "<b>tuned</b> minus base"
    page.select_option("#pair", label="other minus base")
    changes = expected_changes(report, MODELS[2], MODELS[0])
    largest = sorted(map(abs, changes.values()), reverse=True)[:100]
    shown = [float(text) for text in read_column(page, 2)]
    assert min(shown) < 0 < max(shown)
    assert [abs(value) for value in shown] == pytest.approx(largest, abs=0.051)
    page.get_by_role("button", name="change").press("Enter")
    assert [float(text) for text in read_column(page, 2)] == pytest.approx(sorted(changes.values())[:100], abs=0.051)
    assert page.locator("th[aria-sort=ascending]").inner_text() == "change ↑"
    page.get_by_role("button", name="words").press("Enter")
    words = [int(text) for text in read_column(page, 6)]
    assert words == sorted(words, reverse=True) and len(words) == 100
    page.get_by_role("button", name="dialogue").press("Space")
    assert [text.split()[-1] for text in read_column(page, 1)][:3] == ["d0_1", "d1_1", "d2_1"]
    page.get_by_role("button", name="Show all").click()
    assert len(read_column(page, 1)) == 500


@pytest.mark.slow
def test_filters_and_choices(report, open_page):
    page = open_page(report / "out" / "report.html")
    changes = expected_changes(report, MODELS[1], MODELS[0], "rouge2")
    page.select_option("#metric", "rouge2")
    page.select_option("#filter", "worse")
    num_worse = sum(change < -1e-9 for change in changes.values())
    assert page.locator("#count").inner_text().startswith(f"{num_worse} of 500 dialogues")
    page.select_option("#filter", "all")
    page.select_option("#pair", label="other minus base")
    assert "change is other minus base" in page.locator("#count").inner_text()
    page.fill("#search", "d12_1")
    assert [text.split()[-1] for text in read_column(page, 1)] == ["d12_1"]
    page.fill("#search", "no such words")
    assert page.locator("#count").inner_text().startswith("0 of 500")
    page.select_option("#protocol", "first")
    page.fill("#search", "d1_1")
    line = next(line for line in read_jsonl(report / "out" / "predictions.jsonl") if line["id"] == "d1_1")
    assert read_column(page, 3)[-1] == f"{100 * line['scores']['rouge2'][0]:.1f}"


@pytest.mark.slow
def test_differing_words_are_marked(report, open_page):
    page = open_page(report / "out" / "report.html")
    page.fill("#search", "d5_1")
    page.get_by_role("button", name="d5_1").click()
    detail = page.locator("tr.detail").last
    line = next(row for row in read_jsonl(report / "out" / "predictions.jsonl") if row["id"] == "d5_1")
    assert detail.locator(".source").inner_text() == line["dialogue"]
    assert detail.locator(".reference").all_inner_texts() == line["references"]
    # The tuned model's text is the reference without its last word, the base model's begins with a speaker.
    assert detail.locator(".text").nth(1).locator("mark").count() == 0
    assert detail.locator(".text").first.locator("mark").first.inner_text() == "#Person1#:"
    assert " · not in the dialogue: " not in detail.inner_text()
    page.get_by_role("button", name="d5_1").click()
    line = next(
        row for row in read_jsonl(report / "out" / "predictions.jsonl") if len(row["unsupported"]["names"]) == 1
    )
    page.fill("#search", line["id"])
    page.get_by_role("button", name=line["id"]).click()
    label = page.locator("tr.detail dt").filter(has_text=line["model"])
    assert label.inner_text().endswith(f" · not in the dialogue: {line['unsupported']['names'][0]}")
    page.get_by_role("button", name=line["id"]).click()
    assert page.locator("tr.detail").count() == 0


def test_a_phone_and_the_dark(report, open_page):
    page = open_page(report / "out" / "report.html", viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    assert (dark, page.evaluate(background)) == ("rgb(18, 22, 28)", "rgb(255, 255, 255)")


@pytest.mark.slow
def test_500_dialogues(report, open_page):
    """The first 100 are drawn until all are asked for, so that the table keeps up with typing in the search."""
    page = open_page(report / "out" / "report.html")
    rows = page.locator("#table tbody tr:not(.detail)")
    assert rows.count() == 100
    page.get_by_role("button", name="Show all").click()
    assert rows.count() == 500
    assert (report / "out" / "report.html").stat().st_size < 4e6


def test_what_the_dialogue_does_not_hold(report):
    """In each line of predictions.jsonl, as shares in results.json, in a table and in the page's data."""
    lines = read_jsonl(report / "out" / "predictions.jsonl")
    results = json.loads((report / "out" / "results.json").read_text(encoding="utf-8"))
    in_text, in_dialogue = (  # the only names in these rows
        [{"Monday", "Friday"} & set(re.findall(r"\w+", line[key])) for line in lines]
        for key in ("prediction", "dialogue")
    )
    missing = [texts - dialogue for texts, dialogue in zip(in_text, in_dialogue, strict=True)]
    assert [set(line["unsupported"]["names"]) - {"Person1"} for line in lines] == missing
    for name, model in results["models"].items():
        share = sum(bool(words) for words, line in zip(missing, lines, strict=True) if line["model"] == name) / 500
        assert model["unsupported"] == {"numbers": 0, "names": share, "other_script": 0}
    theirs = results["references"]["unsupported"]
    assert theirs["numbers"] == 1, "each reference ends in a number that its dialogue has not"
    table = build_unsupported(results)
    shares = [f"{100 * model['unsupported']['names']:.1f} %" for model in results["models"].values()]
    assert [row[2] for row in table.rows] == [*shares, f"{100 * theirs['names']:.1f} %"]
    assert table.rows[-1][:2] == ["(references)", "100.0 %"]
    assert "| not in the dialogue | numbers | names | other script |" in (report / "out" / "report.md").read_text()
    shown = collect_data(results, lines)["dialogues"]
    index, words = next((index, words) for index, words in enumerate(missing) if len(words) == 1)
    dialogue = next(one for one in shown if one["id"] == lines[index]["id"])
    assert dialogue["unsupported"][MODELS.index(lines[index]["model"])] == words.pop()


@pytest.mark.slow
def test_report_only_writes_the_same_again(report, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("results.json", "predictions.jsonl"):
        shutil.copy(report / "out" / name, folder)
    run = run_script("evaluate_rouge.py", "--report_only", "--output_dir", folder)
    assert run.returncode == 0, run.stderr
    for name in ("report.html", "report.md"):
        assert (folder / name).read_bytes() == (report / "out" / name).read_bytes()
    assert run.stdout.replace(str(folder), "") == (report / "printed.txt").read_text().replace(str(report / "out"), "")
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    for left in (lines[:-1], [], lines[::-1], [line.replace('"model": "', '"system": "', 1) for line in lines]):
        (folder / "predictions.jsonl").write_text("".join(left))
        with pytest.raises(UserError, match="predictions.jsonl does not hold the texts of"):
            read_results(folder)
    results = json.loads((folder / "results.json").read_text())
    shutil.copy(report / "out" / "predictions.jsonl", folder)
    del results["references"]["unsupported"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="results.json is from an earlier version"):
        read_results(folder)
    results["references"]["unsupported"] = results["models"]["base"]["unsupported"]
    del results["comparisons"]["base_vs_other"]["max"]["rouge2"]["p_value_holm"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="results.json is from an earlier version"):
        read_results(folder)
    (folder / "results.json").write_text("{}")
    run = run_script("evaluate_rouge.py", "--report_only", "--output_dir", folder)
    assert (run.returncode, "is from an earlier version" in run.stderr) == (2, True)
    run = run_script("evaluate_rouge.py", "--report_only", "--output_dir", tmp_path / "none")
    assert (run.returncode, "--report_only: there is no " in run.stderr) == (2, True)
    assert not (tmp_path / "none").exists()


def test_markdown(report):
    text = (report / "out" / "report.md").read_text(encoding="utf-8")
    tables, sample = text.split("<details>")
    assert "<b>" not in tables and r"\<b\>tuned\</b\>" in tables
    lines = [line for line in tables.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:11]} == {7}
    assert HOSTILE in sample.split("```text")[1].split("```")[0]
    example = {"split": "test", "index": 0, "dialogue": "````", "summary": "s", "texts": {}}
    results = json.loads((report / "out" / "results.json").read_text()) | {"example": example}
    assert "`````text" in format_markdown(results)


def test_a_page_of_one_model(report, open_page, tmp_path):
    """No pairs, no forest, no change; curves, where there are some."""
    results = json.loads((report / "out" / "results.json").read_text())
    results |= {"models": {"base": results["models"]["base"]}, "comparisons": {}}
    curves = {"train": [[10, 2.0], [20, 1.0]], "validation": [[0, 3.0], [20, 1.5]]}
    results["models"]["base"]["training"] = TRAINING | {"curves": curves}
    lines = [line for line in read_jsonl(report / "out" / "predictions.jsonl") if line["model"] == "base"][:3]
    (tmp_path / "report.html").write_text(build_page(results, lines), encoding="utf-8")
    page = open_page(tmp_path / "report.html")
    assert page.locator("#differences").is_hidden() and page.locator("#pair").is_hidden()
    assert page.locator("#curves svg").count() == 1
    assert "1:01 on 2 cpu" in page.locator("table").filter(has_text="trained parameters").inner_text()
    assert len(read_column(page, 1)) == 3


TRAINING = {
    "num_parameters": 10, "num_trainable_parameters": 5, "num_train_steps": 20, "num_processes": 2,
    "device": "cpu", "size_bytes": 2**20, "seconds": 61.2, "peak_memory_mib": 100.0,
}  # fmt: skip


def write_page(report, path, names: list[str], lowest: float = 0, highest: float = 1, num_updates: int = 20):
    """A page of 30 dialogues with scores between two bounds and with curves of so many updates."""
    results = json.loads((report / "out" / "results.json").read_text(encoding="utf-8"))
    rng = random.Random(0)
    dialogues = [" ".join(["word"] * rng.randint(3, 400)) for _ in range(30)]
    scores = {
        name: {metric: [[rng.uniform(lowest, highest)] for _ in dialogues] for metric in METRICS} for name in names
    }
    models, comparisons = compare_models(scores, seed=0)
    points = sorted({1, num_updates // 3, num_updates} - {0})
    curves = {"train": [[step, 10 / step] for step in points], "validation": [[0, 11.0], [num_updates, 0.5]]}
    for model in models.values():
        model |= {"training": TRAINING | {"curves": curves}, "diagnostics": results["references"]}
        model["unsupported"] = results["references"]["unsupported"]
    lines = [
        {"id": f"test_{index}", "model": name, "prediction": "word " * rng.randint(1, 60), "dialogue": dialogue}
        | {"references": ["word " * 9], "scores": {metric: scores[name][metric][index] for metric in METRICS}}
        | {"unsupported": {"numbers": [], "names": [], "other_script": False}}
        for name in names
        for index, dialogue in enumerate(dialogues)
    ]
    results |= {"models": models, "comparisons": comparisons, "num_dialogues": len(dialogues)}
    path.write_text(build_page(results, lines), encoding="utf-8")


LABEL_FAULTS = """() => [...document.querySelectorAll(".chart svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect(), chart = svg.closest(".chart").id;
  const labels = [...svg.querySelectorAll("text")]
    .filter((text) => text.textContent && text.getAttribute("opacity") !== "0")
    .map((text) => [text.textContent, text.getBoundingClientRect()]);
  const outside = labels
    .filter(([, box]) => box.left < frame.left || box.right > frame.right
      || box.top < frame.top || box.bottom > frame.bottom)
    .map(([text]) => `${chart}: ${text} is outside`);
  const colliding = labels.flatMap(([text, a], index) => labels.slice(index + 1)
    .filter(([, b]) => a.left < b.right + 2 && b.left < a.right + 2 && a.top < b.bottom && b.top < a.bottom)
    .map(([other]) => `${chart}: ${text} on ${other}`));
  const numbers = labels.filter(([text, box]) => /^[−\\d.,kM]+$/.test(text) && box.top > frame.bottom - 52);
  const middles = numbers.map(([, box]) => (box.left + box.right) / 2).sort((a, b) => a - b);
  const gaps = middles.slice(1).map((middle, index) => middle - middles[index]);
  const uneven = chart !== "by_length" && Math.max(...gaps) - Math.min(...gaps) > 2 ? [`${chart}: uneven`] : [];
  return [...outside, ...colliding, ...uneven];
})"""
DRAWN = """() => [...document.querySelectorAll(".chart")].filter((chart) => chart.clientWidth).every((chart) => {
  const svg = chart.querySelector("svg");
  return svg && Number(svg.getAttribute("width")) === chart.clientWidth;
})"""
ALIKE = [f"flan-t5-base-dialogsum-lora-r16-alpha32-lr3e-4-10-epochs-seed-{seed}" for seed in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "lowest", "highest", "num_updates"),
    [
        (["one"], 0, 0.02, 1),
        (["base", "tuned"], 0.97, 1, 200),
        (["base", "full", "lora", "rows", "random", "first"], 0, 0.01, 100_000),
        (ALIKE[:2], 0.3, 0.4, 1_234_567),
        (ALIKE, 0, 1, 20_000),
    ],
)
def test_labels_of_charts_neither_collide_nor_end_outside(
    report, open_page, tmp_path, names, lowest, highest, num_updates
):
    write_page(report, tmp_path / "report.html", names, lowest, highest, num_updates)
    page = open_page(tmp_path / "report.html", viewport={"width": 1400, "height": 900})
    for width in (1400, 800, 400):
        page.set_viewport_size({"width": width, "height": 900})  # the charts are drawn anew
        wait_for(page, DRAWN)
        assert page.evaluate(LABEL_FAULTS) == [], width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    labels = page.locator("#score_distribution .role-axis-label text").all_text_contents()
    rows = {label for label in labels if not label.isdigit()}
    assert len(rows) == len(names), "names that differ at the end alone are told apart on a phone, too"
    groups = page.locator("#by_length .role-axis-label text").all_text_contents()
    assert sum("–" in label for label in groups) == 6, "no group is without its label"
    assert page.locator("#by_length_legend li").all_text_contents() == names
    updates = page.locator("#curves .role-axis-label text").all_text_contents()
    assert "0.5" not in updates or num_updates > 1, "there is no half update"


@pytest.mark.slow
def test_intervals_of_few_dialogues(report, open_page):
    """Student's t, not 1.96; none of a single dialogue, and none beyond what a score can be."""
    page = open_page(report / "out" / "report.html")
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 99: 1.984}
    found = page.evaluate("[1, 2, 3, 4, 9, 99].map(studentT)")
    assert found == pytest.approx(list(exact.values()), rel=0.012)
    scores = [40.0, 50.0, 60.0, 45.0, 55.0]  # standard deviation 7.906, standard error 3.536
    assert page.evaluate("estimate([40, 50, 60, 45, 55])") == pytest.approx(
        {"score": sum(scores) / 5, "low": 50 - 2.776 * 3.536, "high": 50 + 2.776 * 3.536}, rel=0.005
    )
    assert page.evaluate("estimate([7])") == {"score": 7, "low": None, "high": None}
    assert page.evaluate("estimate([0, 100])") == {"score": 50, "low": 0, "high": 100}


VIEW = "&".join(
    ("metric=rouge2", "protocol=max", "pair=other+minus+base", "filter=worse", "mark=base", "search=d1")
    + ("sort=model+other", "order=ascending")
)


def read_view(page) -> list[str]:
    names = ("metric", "protocol", "pair", "filter", "mark", "search")
    values = [page.locator(f"#{name}").input_value() for name in names]
    return [*values, page.locator("#table th:not([aria-sort=none])").text_content()]


@pytest.mark.slow
def test_the_view_is_in_the_url(report, open_page):
    page = open_page(report / "out" / "report.html")
    at_first = read_view(page)
    assert "#" not in page.url
    for name, value in (("metric", "rouge2"), ("protocol", "max"), ("pair", "other minus base"), ("filter", "worse")):
        page.select_option(f"#{name}", value)
    page.select_option("#mark", "base")
    page.fill("#search", "d1")
    page.get_by_role("button", name="other", exact=True).dblclick()
    wait_for(page, f"location.hash === '#{VIEW}'")
    view, shown = read_view(page), read_column(page, 5)
    assert view == ["rouge2", "max", "other minus base", "worse", "base", "d1", "other ↑"]
    page.reload()
    assert (read_view(page), read_column(page, 5)) == (view, shown)
    page.get_by_role("button", name="d14_1").click()
    wait_for(page, f"location.hash === '#{VIEW}&dialogue=d14_1'")
    page.locator(".skip").press("Enter")
    wait_for(page, f"location.hash === '#{VIEW}&dialogue=d14_1'")
    assert read_view(page) == view, "the link to a place in the page left the view as it was"
    page.evaluate("location.hash = ''")
    wait_for(page, "document.getElementById('metric').value === 'rouge1'")
    assert read_view(page) == at_first


@pytest.mark.slow
def test_a_view_of_unknown_values_is_as_at_first(report, open_page):
    unknown = "metric=rouge9&protocol=&pair=base+minus+none&filter=%zz&mark=<b>&sort=__proto__&order=up"
    unknown += "&dialogue=none&__proto__=1"
    plain, page = (open_page(f"{report / 'out' / 'report.html'}{hash}") for hash in ("", f"#{unknown}"))
    assert (read_view(page), read_column(page, 1)) == (read_view(plain), read_column(plain, 1))
    wait_for(page, "location.hash === ''")


@pytest.mark.slow
def test_the_sample_is_found_in_the_list(report, open_page):
    """Whatever is searched for, and in a tab of its own."""
    page = open_page(report / "out" / "report.html")
    assert "Row 9 of the split, id d3_1." in page.locator("main").inner_text()
    page.fill("#search", "no such words")
    page.select_option("#metric", "rouge2")
    page.locator("#to_sample").click()
    wait_for(page, "location.hash === '#metric=rouge2&dialogue=d3_1'")
    others = open_page(f"{report / 'out' / 'report.html'}{page.locator('#to_sample').get_attribute('href')}")
    for opened in (page, others):
        wait_for(opened, "document.activeElement.dataset.id === 'd3_1'")
        button = opened.locator("button[data-id=d3_1]")
        assert button.get_attribute("aria-expanded") == "true"
        form = opened.locator("#choice").bounding_box()
        assert form["y"] + form["height"] < button.bounding_box()["y"] < 720, "in sight, below the form"
        assert HOSTILE in opened.locator("tr.detail .source").last.inner_text()


@pytest.mark.slow
def test_the_sample_of_any_id(report, open_page, tmp_path):
    """Of a row that is not its dialogue's first, of ids that would like to be markup, and of one not scored."""
    results = json.loads((report / "out" / "results.json").read_text())
    lines = read_jsonl(report / "out" / "predictions.jsonl")
    first = '"><img src=x>&amp;+%20#é'
    for line in lines:
        line["id"] = first if line["id"] == "d3_1" else line["id"]
    results["example"]["id"] = "<b>second"
    (tmp_path / "report.html").write_text(build_page(results, lines), encoding="utf-8")
    page = open_page(tmp_path / "report.html")
    said = page.locator("#to_sample").locator("xpath=ancestor::p").inner_text()
    assert said == f"Row 9 of the split, id <b>second. Show it in the list, under the id {first} of its first row."
    page.locator("#to_sample").click()
    assert page.evaluate("document.activeElement.dataset.id") == first
    wait_for(page, "location.hash !== ''")
    page.reload()
    wait_for(page, f"document.activeElement.dataset.id === {json.dumps(first)}")
    results["example"]["dialogue"] = "another"
    assert "Its dialogue is not among those scored." in build_page(results, lines)


@pytest.mark.slow
def test_without_javascript(report, open_page, tmp_path):
    page = open_page(report / "out" / "report.html", java_script_enabled=False)
    assert (
        "JavaScript is off: the charts and the list of all dialogues are missing."
        in page.locator("header").inner_text()
    )
    results = json.loads((report / "out" / "results.json").read_text(encoding="utf-8"))
    assert page.locator(".conclusions li").all_inner_texts() == results["conclusions"]
    page.get_by_text("All differences as numbers").click()
    for table in (0, 1, 2):
        assert page.locator("main table:not(#table)").nth(table).is_visible()
    assert page.locator("main table:not(#table) tbody tr").count() == 9 + 9 + 4 + 4
    assert HOSTILE in page.locator("dl").first.inner_text(), "the sample"
    for name in ("#choice", "#browse", "#table", "#to_sample", ".chart >> nth=0", "figcaption >> nth=0", ".skip"):
        assert page.locator(name).is_hidden(), name
    write_page(report, tmp_path / "report.html", ["one"])
    assert open_page(tmp_path / "report.html", java_script_enabled=False).locator("#differences").is_hidden()
    with_javascript = open_page(report / "out" / "report.html")
    assert "JavaScript" not in with_javascript.locator("body").inner_text()


@pytest.mark.slow
def test_a_wide_table_says_that_it_scrolls(report, open_page):
    """Only where it does; the page itself does not, and the table's title is read without."""
    page = open_page(report / "out" / "report.html", viewport={"width": 1400, "height": 900})
    page.locator("summary").evaluate_all("all => all.forEach((summary) => summary.click())")
    hints = page.locator(".hint")
    assert hints.count() == 6
    agree = "({ hidden, nextElementSibling: box }) => hidden === (box.scrollWidth <= box.clientWidth)"
    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 900})
        wait_for(page, f"[...document.querySelectorAll('.hint')].every({agree})")
    assert "scrolls sideways" in hints.first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    title = page.locator("caption span").first.bounding_box()
    assert title["x"] >= 0 and title["x"] + title["width"] <= 400


def test_json_in_a_page_cannot_end_its_element():
    text = escape_json({"a": "</script><!--&", "b": "\u2028 你"})
    assert "<" not in text and ">" not in text and "&" not in text
    assert json.loads(text) == {"a": "</script><!--&", "b": "\u2028 你"}


TABLE = Table("title", ["model", "rouge1"], [["a", "1.00"], ["longer", "10.00"]], {(1, 1): "best"})


def test_table_is_aligned():
    plain = ["model   rouge1", "------  ------", "a         1.00", "longer   10.00"]
    assert format_table(TABLE).splitlines() == plain


def make_comparison(**found: tuple[float, float]) -> dict:
    """Of each metric a difference and a corrected p-value; those not given are noise."""
    noise = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), (0.1, 0.05))
    return {
        "average": {
            name: {"difference": difference, "p_value": 0.01, "p_value_holm": p_value}
            for name, (difference, p_value) in (noise | found).items()
        }
    }


def test_sentences():
    pairs = [(("a", "b"), make_comparison(rouge1=(0.1, 0.049))), (("a", "c"), make_comparison(rouge1=(-0.1, 0.001)))]
    beyond, within = describe_differences(pairs, 40)
    assert beyond.endswith(": a above b in rouge1; c above a in rouge1.")
    assert within.endswith(": a and b in rouge2, rougeL, rougeLsum; a and c in rouge2, rougeL, rougeLsum.")
    assert describe_differences(pairs, 39) == [
        "Only 39 dialogues scored: too few to say of any difference that it is beyond noise; 40 are needed. "
        "This is a quick look, not a result."
    ]
    same = make_comparison(**dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), (0.1, 0.0)))
    assert describe_differences([(("a", "b"), same), (("a", "c"), same)], 40) == [
        "Beyond noise (corrected p below .05, average over references): a above b and c in every metric."
    ]


def test_both_p_values_are_shown(report):
    results = json.loads((report / "out" / "results.json").read_text(encoding="utf-8"))
    results["comparisons"]["base_vs_other"]["average"]["rouge1"] |= {"p_value": 0.0123, "p_value_holm": 0.0456}
    table = build_differences(results)
    assert "p-value alone / corrected by Holm for the 12 comparisons" in table.title
    assert table.rows[1][:2] == ["base minus other", "average"] and table.rows[1][2].endswith("] p .012 / .046")
    assert table.rows[0][2].endswith("] p <.001 / .001") and table.styles[0, 2] == "below"
    assert set(build_differences(results | {"num_dialogues": 39}).styles.values()) == {"noise"}
    shown = collect_data(results | {"num_dialogues": 39}, [])["comparisons"][0]["scores"]["average"]["rouge1"]
    assert shown["verdict"] == "noise"


def test_one_reference_a_dialogue_is_scored_in_one_way(report):
    """The three protocols would give the same numbers three times."""
    results = json.loads((report / "out" / "results.json").read_text(encoding="utf-8"))
    for num_rows, protocols in ((1500, ["average", "max", "first"]), (500, ["average"])):
        for table in build_tables(results | {"num_rows": num_rows})[:2]:
            assert list(dict.fromkeys(row[1] for row in table.rows)) == protocols


@pytest.mark.slow
@pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")
def test_few_real_rows_are_called_a_quick_look(tmp_path):
    """`--max_eval_samples 10` of DialogSum: intervals all the same, and a sentence that says what they are worth."""
    rows = [{"id": f"test_{index}_1", "prediction": "#Person1# talks."} for index in range(4)]
    write_rows(tmp_path / "texts.jsonl", rows)
    run = run_script(
        "evaluate_rouge.py", "--predictions_file", tmp_path / "texts.jsonl", "--max_eval_samples", 10,
        "--test_file", DIALOGSUM / "test.csv", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "4 dialogues with 10 references" in run.stdout and "This is a quick look, not a result." in run.stdout
    assert re.search(r"texts +average +\d+\.\d\d \[\d+\.\d, \d+\.\d\]", run.stdout)


def test_a_dialogue_cannot_command_the_terminal(tmp_path, capsys):
    AcceleratorState._reset_state(True)
    row = {"id": "a", "dialogue": "a\tb\n\x1b]0;owned\x07c\r\x9bd", "summary": "Hi \x1b[2J."}
    write_rows(tmp_path / "test.jsonl", [row])
    write_rows(tmp_path / "texts.jsonl", [{"id": "a", "prediction": "Hi\x1b[31m."}])
    evaluate_rouge.main(
        EvaluationConfig(
            test_file=str(tmp_path / "test.jsonl"), predictions_file=[str(tmp_path / "texts.jsonl")],
            output_dir=str(tmp_path / "out"),
        )
    )  # fmt: skip
    shown = capsys.readouterr().out
    for text in ("a\tb\n\ufffd]0;owned\ufffdc\ufffd\ufffdd", "Hi \ufffd[2J.", "Hi\ufffd[31m."):
        assert text in shown
    assert not set("\x1b\x07\r\x9b") & set(shown)
    assert read_jsonl(tmp_path / "out" / "predictions.jsonl")[0]["prediction"] == "Hi\x1b[31m."


COUNTS = {"num_parameters": 10, "num_trainable_parameters": 5, "num_train_steps": 2, "num_processes": 1}
LINE = {"step": 1, "split": "train", "loss": 2.5, "num_examples": 4, "samples_per_second": 2.0}
HARMLESS = {
    "run_manifest.json": json.dumps(COUNTS | {"device": "cpu"}),
    "metrics.jsonl": json.dumps(LINE | {"peak_memory_mib": 100.0}),
}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("metrics.jsonl", "2.5", '"2.5"'),
        ("metrics.jsonl", "2.5", "NaN"),
        ("metrics.jsonl", "2.5", "[" * 100_000),
        ("metrics.jsonl", "2.5", "1" + "0" * 400),
        ("metrics.jsonl", "2.0", "0"),
        ("metrics.jsonl", '"train"', "[]"),
        ("metrics.jsonl", "100.0", "Infinity"),
        ("run_manifest.json", "10", '"<b>"'),
        ("run_manifest.json", "10", "null"),
        ("run_manifest.json", '{"num_parameters"', '{"n"'),
    ],
)
def test_a_training_that_says_nonsense_of_itself_is_left_out(tmp_path, file, old, new):
    for name, text in HARMLESS.items():
        (tmp_path / name).write_text(text)
    found = read_training(tmp_path)
    assert (found["seconds"], found["peak_memory_mib"], found["curves"]["train"]) == (2.0, 100.0, [[1, 2.5]])
    assert old in HARMLESS[file]
    (tmp_path / file).write_text(HARMLESS[file].replace(old, new))
    hostile = read_training(tmp_path)
    assert hostile is None or (new == "[]" and hostile["curves"]["train"] == [])
