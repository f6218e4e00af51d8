"""report.html: one file that needs no network, with Vega-Lite's charts and a table of all dialogues to browse.

Text from the data reaches the page in two ways: through html.escape, or as JSON without `<`, `>` and `&`, which the
page's script writes as text and never as markup.
"""

import functools
import html
import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import vl_convert

from utils.scoring.metrics.rouge import METRICS, PROTOCOLS
from utils.scoring.metrics.words import split_words
from utils.scoring.tables import ENOUGH_DIALOGUES, Table, build_tables, judge, pair_comparisons

PAGE = Path(__file__).parent / "report_page"
SCRIPTS = ("basics", "drawing", "charts", "dialogues", "view")  # in this order: the last one starts them
HINT = '<p class="hint" hidden>This table is wider than the page: it scrolls sideways.</p>'
SOFTWARE = ("git_commit", "python_version", "library_versions", "data_fingerprint", "num_processes")


def build_page(results: dict[str, Any], predictions: list[dict[str, Any]]) -> str:
    """The whole page, of a results.json and the lines of its predictions.jsonl."""
    example = results["example"]
    scores, differences, *others = map(render_table, build_tables(results))
    parts = {
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
        "charting_library": charting_library(),
        "data": escape_json(collect_data(results, predictions)),
        "size": f"{results['num_dialogues']:,} dialogues of the {html.escape(str(example['split']))} split, "
        f"{results['num_rows']:,} references",
        "conclusions": "".join(f"<li>{html.escape(text)}</li>" for text in results["conclusions"]),
        "enough": str(ENOUGH_DIALOGUES),
        "scores": scores,
        "differences": differences,
        "without_differences": "" if results["comparisons"] else " hidden",
        "other_tables": "\n".join(others),
        "hint": HINT,
        "example": render_example(example, predictions),
        "settings": render_settings(results),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    # In one pass: a dialogue that holds a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


@functools.cache
def charting_library() -> str:
    """Vega, Vega-Lite and vega-embed in one script (BSD-3-Clause, University of Washington Interactive Data Lab)."""
    return vl_convert.javascript_bundle().replace("</script", "<\\/script")


def escape_json(value: Any) -> str:
    """JSON in which no character can end the element that holds it, or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def collect_data(results: dict[str, Any], predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script reads; `dialogues[i]` has texts, what marks them and scores in the order of
    `models`."""
    names = list(results["models"])
    dialogues = {}
    for line in predictions:
        empty = {"id": line["id"], "dialogue": line["dialogue"], "references": line["references"]}
        one = dialogues.setdefault(line["id"], empty | {"texts": {}, "truncated": {}, "unsupported": {}, "scores": {}})
        one["words"] = len(split_words(line["dialogue"]))
        one["texts"][line["model"]] = line["prediction"]
        one["truncated"][line["model"]] = line.get("truncated")
        one["unsupported"][line["model"]] = name_unsupported(line["unsupported"])
        one["scores"][line["model"]] = {
            metric: [round(value, 6) for value in values] for metric, values in line["scores"].items()
        }
    for one in dialogues.values():
        one |= {key: [one[key][name] for name in names] for key in ("texts", "truncated", "unsupported", "scores")}
    trainings = {name: results["models"][name].get("training") for name in names}
    return {
        "models": names,
        "metrics": METRICS,
        "protocols": PROTOCOLS,
        "comparisons": [
            {"pair": pair, "scores": add_verdicts(scores, results["num_dialogues"])}
            for pair, scores in pair_comparisons(results)
        ],
        "curves": [[name, training["curves"]] for name, training in trainings.items() if training],
        "dialogues": list(dialogues.values()),
    }


def name_unsupported(found: dict[str, Any]) -> str:
    """What find_unsupported found, each once."""
    words = dict.fromkeys([*found["numbers"], *found["names"]])
    return ", ".join([*words, *["its script"] * found["other_script"]])


def add_verdicts(comparison: dict[str, dict[str, dict]], num_dialogues: int) -> dict[str, dict[str, dict]]:
    return {
        protocol: {metric: entry | {"verdict": judge(entry, num_dialogues)} for metric, entry in entries.items()}
        for protocol, entries in comparison.items()
    }


def render_table(table: Table) -> str:
    """An HTML table that scrolls on its own where the screen is narrow; nothing for one without rows."""
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    lines = []
    for number, row in enumerate(table.rows):
        cells = [f'<th scope="row">{html.escape(row[0])}</th>']
        for column, cell in enumerate(row[1:], start=1):
            shown = re.sub(r"(\[.*)", r"<small>\1</small>", html.escape(cell))
            cells.append(f'<td class="{table.styles.get((number, column), "")}">{shown}</td>')
        group = ' class="group"' if number and row[1] != table.rows[number - 1][1] and row[1] in PROTOCOLS else ""
        lines.append(f"<tr{group}>{''.join(cells)}</tr>")
    caption = f"<caption><span>{html.escape(table.title)}</span></caption>"
    body = "\n".join(lines)
    return (
        f'{HINT}\n<div class="wide" tabindex="0" role="region" aria-label="{html.escape(table.header[0])}">'
        f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def render_example(example: dict[str, Any], predictions: list[dict[str, Any]]) -> str:
    """The sample with its id, and a link to the entry of its dialogue, whose id may be that of another of its rows."""
    texts = {"dialogue": example["dialogue"], "human summary": example["summary"], **example["texts"]}
    shown = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in texts.items())
    where = f"Row {example['index']} of the split, id {html.escape(example['id'])}. "
    entry = next((line["id"] for line in predictions if line["dialogue"] == example["dialogue"]), None)
    if entry is None:
        where += "Its dialogue is not among those scored."
    else:
        href = f"#dialogue={urllib.parse.quote(entry, safe='')}"
        others = "" if entry == example["id"] else f", under the id {html.escape(entry)} of its first row"
        where += f'<span class="scripted"><a id="to_sample" href="{href}">Show it in the list</a>{others}.</span>'
    return f"<p>{where}</p><dl>{shown}</dl>"


def render_settings(results: dict[str, Any]) -> str:
    known = results["settings"] | {name: results[name] for name in SOFTWARE}
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in known.items()]
    return render_table(Table("Settings and versions", ["setting", "value"], rows, {}))
