"""The report: what its files and its page hold, read back with parsers that know nothing of how they were written."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from rich.console import Console

from ropelab import report
from ropelab.report.results import csv_text
from tests.records import result, results

pytestmark = pytest.mark.integration

LADDER = (128, 256, 512, 1024)
HOSTILE = "</script><img src=x onerror=alert(1)>"


def evaluation(pos: str, ppls: list[float | None], protocol: str = "last", **more: Any) -> dict[str, Any]:
    rows = [
        {
            "ctx": ctx,
            "factor": more.get("factor"),
            "ppl": ppl,
            "nll": None if ppl is None else math.log(ppl),
            "bits_per_byte": None if ppl is None else math.log2(ppl),
            "tokens": 0 if ppl is None else 4096,
            "documents": 0 if ppl is None else 64,
            "ci95": None if ppl is None else [round(0.9 * ppl, 4), round(1.2 * ppl, 4)],
            "status": "undefined" if ppl is None else "ok",
            "reason": "the table ends at 128 positions" if ppl is None else None,
            "unit": None if ppl is None else "document",
        }
        for ctx, ppl in zip(LADDER, ppls, strict=False)
    ]
    facts = {"name": protocol, "last": 64 if protocol == "last" else None, "stride": None, "documents": 64}
    facts |= {"left_out": 3, "targets_digest": f"{protocol}0123456789", "dtype": "fp32", "max_ctx": None}
    facts |= {"tokens": 65536, "document_digests": [f"{index:064x}" for index in range(64)]}
    item = {"run": f"{pos}-stdlib-s0-00000000", "pos": pos, "scaling": "none", "factor": None, "train_ctx": 128}
    return {**item, "protocol": facts, "window": None, "seed": 0, "data": "stdlib", "rows": rows, **more}


def verdict(word: str, theta: float | None, tau: float | None, ends: list[float | None] | None) -> dict[str, Any]:
    check = {"statement": "yarn8@8L < plain@8L by 0.5", "theta": theta, "tau": tau, "interval": ends, "verdict": word}
    return {
        "claim": "c-yarn-8x",
        "statement": "YaRN rescues 8L",
        "source": "Peng et al. 2024, arXiv 2309.00071",
        "verdict": word,
        "raw_verdict": word,
        "reason": "because",
        "one_seed": True,
        "notes": ["a note"],
        "checks": [{**check, "size": "matches"}],
    }


EVALS = [
    evaluation("rope", [4.43, 9.05, 17.8, 29.6]),
    evaluation("rope", [4.431, 4.432, 4.433, 4.434], window=128),
    evaluation("rope", [6.9, 7.1, 7.2, 7.39], scaling="yarn", factor=8.0),
    evaluation("alibi", [4.94, 4.94, 4.96, 4.94]),
    evaluation("alibi", [4.94, 4.93, 4.92, 4.92], window=128),
    evaluation("learned", [5.46, None, None, None]),
    evaluation("rope", [5.30, 6.52, 10.2, 16.4], "nonoverlapping"),
]
VERDICTS = [
    verdict("PASS", 1.28, 0.5, [1.05, 1.51]),
    verdict("FAIL", -0.16, 0.0, [-0.21, -0.1]),
    verdict("INCONCLUSIVE", 1.24, 0.94, [0.79, 1.69]),
    verdict("PASS", None, None, None),
]


class Page(HTMLParser):
    """A page taken apart: tags with attributes, cells of tables, scripts, visible text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str, str]] = []
        self.styles: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type") or "", ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "small" and self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += "|"

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif "style" in self.open:
            self.styles.append(data)
        else:
            self.words.append(data)
            if "td" in self.open or "th" in self.open:
                self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write(folder: Path, **more: Any) -> Path:
    given: dict[str, Any] = {"evals": EVALS, "verdicts": VERDICTS, "title": "Lengths", "notes": [], "manifest": {}}
    given |= more
    return report.write_report(folder, **(given | {"evals": results(given["evals"])}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = {"torch": "2.13.0", "train": {"steps": 1000, "lr": 0.003}, "git": {"dirty": False}}
    return write(tmp_path_factory.mktemp("report"), notes=["One seed."], manifest=manifest).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_files_are_all_there_and_nothing_else(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["curves.png", "report.html", "results.csv", "results.json"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_the_input(folder: Path) -> None:
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == {
        "evals": [item.to_json() for item in results(EVALS)], "verdicts": VERDICTS,
    }  # fmt: skip


def test_csv_is_one_line_a_row(folder: Path) -> None:
    lines = list(csv.DictReader(StringIO((folder / "results.csv").read_text(encoding="utf-8"))))
    rows = [(item, row) for item in EVALS for row in item["rows"]]
    assert len(lines) == len(rows) == 28
    for line, (item, row) in zip(lines, rows, strict=True):
        assert (line["run"], line["pos"], line["protocol"]) == (item["run"], item["pos"], item["protocol"]["name"])
        assert int(line["ctx"]) == row["ctx"]
        assert line["status"] == row["status"]
        assert line["window"] == ("" if item["window"] is None else str(item["window"]))
        for key, value in (("ppl", row["ppl"]), ("nll", row["nll"]), ("ci95_high", (row["ci95"] or [None, None])[1])):
            assert (float(line[key]) if line[key] else None) == value


FORMULAS = ("=HYPERLINK(1)", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-a\r=1")


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_text_of_a_stranger_is_a_formula_in_csv(formula: str) -> None:
    """Names, encodings and reasons behind an apostrophe; numbers, spelled ones too, stay numbers."""
    item = result(EVALS[0])
    row = dataclasses.replace(item.rows[0], reason=formula, nll=-0.5, status=formula, ppl="-1e-3")  # type: ignore[arg-type]
    protocol = dataclasses.replace(item.protocol, name=formula)
    changed = {"run": formula, "pos": formula, "data": formula, "scaling": formula, "protocol": protocol, "rows": [row]}
    (line,) = csv.DictReader(StringIO(csv_text([dataclasses.replace(item, **changed)]), newline=""))
    for key in ("run", "pos", "data", "scaling", "protocol", "reason", "status"):
        assert line[key] == "'" + formula.replace("\r", "\n"), key
    assert (line["nll"], line["ppl"]) == ("-0.5", "-1e-3")
    assert not any(value.startswith(("=", "+", "@", "\t", "\r")) for value in line.values())


def test_page_loads_nothing(page: Page) -> None:
    """No attribute, style or policy lets the page ask a network for anything."""
    loading = ("src", "href", "srcset", "action", "formaction", "poster", "data", "xlink:href", "background", "ping")
    for tag, attributes in page.tags:
        for name in set(loading) & set(attributes):
            assert (attributes[name] or "").startswith("data:image/png;base64,"), f"<{tag} {name}>"
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
    assert not re.search(r"url\(|@import|http", "".join(page.styles))
    (policy,) = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "http" not in policy
    for source in ("'unsafe-inline'", "'unsafe-eval'", "*", "data:", "blob:"):
        assert source not in rules["script-src"].split()


def test_policy_names_exactly_the_scripts_of_the_page(page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    programs = [text for kind, text in page.scripts if kind != "application/json"]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in programs]
    assert re.findall(r"'sha256-([^']+)'", policy or "") == digests
    assert len(programs) == 2
    assert "Licensed under the MIT license" in programs[0][:300]  # the banner of plotly.js stays
    assert "Copyright" in programs[0][:300]


def test_picture_is_in_the_page_for_readers_without_javascript(folder: Path, page: Page) -> None:
    (image,) = page.named("img")
    source = image["src"] or ""
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (folder / "curves.png").read_bytes()
    assert "RoPE 4.43 at 128, 29.6 at 1024" in (image["alt"] or "")


def test_sections_come_in_order(page: Page) -> None:
    names = [section["id"] for section in page.named("section")]
    assert names == ["verdicts", "curves", "numbers", "protocol", "context", "reproduce", "versions"]
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]


def test_headline_says_what_was_found(page: Page) -> None:
    assert (
        "2 of 4 claims hold here, 1 does not and 1 stays open. At 1024 tokens, 8 times the training length, perplexity "
        "runs from 4.94 (ALiBi) to 29.6 (RoPE), by the protocol “last”; learned is undefined past 128." in page.text
    )


def test_table_has_the_numbers_of_the_rows(page: Page) -> None:
    (table,) = [table for table in page.tables if len(table) == 7 and table[0][0] == "Method"]
    assert table[0] == ["Method", "128|trained", "256", "512", "1024"]
    assert table[1] == ["RoPE", "4.43|3.99 to 5.32", "9.05|8.14 to 10.9", "17.8|16.0 to 21.4", "29.6|26.6 to 35.5"]
    assert [row[0] for row in table[1:]] == [
        "RoPE",
        "RoPE, window 128",
        "RoPE + YaRN ×8",
        "ALiBi",
        "ALiBi, window 128",
        "learned",
    ]
    assert table[6][2:] == ["undefined1"] * 3  # 1 is the footnote
    assert "learned: the table ends at 128 positions" in page.text
    assert all(cell.get("scope") in ("col", "row") for cell in page.named("th"))


def test_context_gain_and_window_control(page: Page) -> None:
    (table,) = [table for table in page.tables if table[0][-1] == "Reading"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert list(rows) == ["RoPE", "RoPE + YaRN ×8", "ALiBi"]
    # ln 4.43 - ln 29.6 = 1.488 - 3.388; ln 6.9 - ln 7.39 = 1.932 - 2.000; ALiBi's ends are equal
    assert rows["RoPE"] == ["−1.90", "29.6", "4.43|W = 128", "context hurts; worse than its own window"]
    assert rows["RoPE + YaRN ×8"] == ["−0.069", "7.39", "–", "context hurts"]
    assert rows["ALiBi"][0] == "0.00"
    assert rows["ALiBi"][3] == "flat; equal to its own window: no use of older tokens shows"


def test_protocol_box_says_what_was_scored(page: Page) -> None:
    for said in (
        "The final 64 targets of each block; the targets stay, only the context grows.",
        "documents left out as too short",
        "last0123456789",
        "64 entries, listed in results.json",
    ):
        assert said in page.text
    assert "f" * 20 not in page.text


def test_verdict_cards(page: Page) -> None:
    cards = [tag["class"] for tag in page.named("article")]
    assert cards == ["verdict pass", "verdict fail", "verdict inconclusive", "verdict pass"]
    assert "θ = 1.28 (1.05 to 1.51), τ = 0.50; perplexity ratio 3.60" in page.text  # e^1.28 = 3.597
    assert "exact: holds or does not, nothing is estimated" in page.text
    for word in ("✓ PASS", "✗ FAIL", "? INCONCLUSIVE", "one seed", "a note", "arXiv 2309.00071", "size as published"):
        assert word in page.text


def test_interval_bars_show_which_side_of_the_threshold(page: Page) -> None:
    bars = [tag for tag in page.named("svg") if tag.get("role") == "img"]
    assert len(bars) == 3  # none for the exact check
    assert (bars[0]["aria-label"] or "").startswith("θ = 1.28 (1.05 to 1.51), τ = 0.50")
    thresholds = [float(tag["x1"] or 0) for tag in page.named("line") if tag.get("class") == "tau"]
    ends = [
        (float(tag["x1"] or 0), float(tag["x2"] or 0))
        for tag in page.named("line")
        if "interval" in str(tag.get("class"))
    ]
    dots = [float(tag["cx"] or 0) for tag in page.named("circle") if "theta" in str(tag.get("class"))]
    for left, right in ends:
        assert 0 <= left < right <= 300
    assert thresholds[0] < ends[0][0] < dots[0] < ends[0][1]  # PASS: all of it to the right
    assert ends[1][0] < dots[1] < ends[1][1] < thresholds[1]  # FAIL: all of it to the left
    assert ends[2][0] < thresholds[2] < dots[2] < ends[2][1]  # open: across
    # 0 to 1.51 with 8% margins on 300 units: 0.5 lies at 300 * (0.5 + 0.1208) / (1.51 * 1.16)
    assert thresholds[0] == pytest.approx(106.3, abs=0.1)


def test_interactive_curves_are_valid_and_hold_the_rows(page: Page) -> None:
    specs = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    assert len(specs) == 2
    for spec in specs:
        plain = [{key: value for key, value in trace.items() if key != "meta"} for trace in spec["data"]]
        go.Figure(data=plain, layout=spec["layout"])  # plotly's own validation of every name and value
        assert (spec["layout"]["xaxis"]["type"], spec["layout"]["yaxis"]["type"]) == ("log", "log")
        assert [shape["x0"] for shape in spec["layout"]["shapes"]] == [128]
    curves = {trace["name"]: trace for trace in specs[0]["data"] if "error_y" in trace}
    assert curves["RoPE"]["x"] == list(LADDER)
    assert curves["RoPE"]["y"] == [4.43, 9.05, 17.8, 29.6]
    assert curves["RoPE"]["error_y"]["array"] == pytest.approx([0.2 * y for y in (4.43, 9.05, 17.8, 29.6)], abs=1e-3)
    assert "perplexity 29.6 (26.6 to 35.5)" in curves["RoPE"]["hovertext"][3]
    assert "4.888 bits per byte" in curves["RoPE"]["hovertext"][3]  # log2 29.6 = 4.8875
    (cross,) = [trace for trace in specs[0]["data"] if trace["mode"] == "markers+text"]
    assert cross["x"] == [256]
    assert "learned: undefined past 128" in cross["text"][0]


def test_commands_repeat_the_evaluations(page: Page) -> None:
    shown = page.text
    assert "ropelab reproduce c-yarn-8x" in shown
    assert (
        "ropelab eval rope-stdlib-s0-00000000 --ctx 128,256,512,1024 --protocol last --scaling yarn --factor 8 "
        "eval.last=64 eval.tokens=65536" in shown
    )
    assert "--scaling none eval.last=64 eval.tokens=65536 eval.window=128" in shown


def test_manifest_is_a_table_and_its_commands_come_first(folder: Path, tmp_path: Path, page: Page) -> None:
    (table,) = [table for table in page.tables if table[0][0] == "torch"]
    assert table == [["torch", "2.13.0"], ["train.steps", "1000"], ["train.lr", "0.003"], ["git.dirty", "no"]]
    told = Page(write(tmp_path, manifest={"commands": ["ropelab reproduce demo"], "torch": "2.13.0"}).read_text())
    assert "ropelab reproduce demo" in told.text
    assert "ropelab eval" not in told.text
    assert "commands" not in [row[0] for table in told.tables for row in table]


def test_no_string_becomes_markup(tmp_path: Path) -> None:
    bad = [
        evaluation(HOSTILE, [4.43, None], run=HOSTILE),
        evaluation(HOSTILE, [4.43, 9.05], run="other", data=HOSTILE, scaling=HOSTILE, factor=2.0),
        evaluation("rope", [4.0, 5.0], run=HOSTILE, seed=0),
        evaluation("rope", [4.0, 5.0], run=HOSTILE + "2", seed=1),
    ]
    bad[0]["rows"][1] |= {"reason": HOSTILE, "status": HOSTILE}
    for item in bad:
        item["protocol"] |= {"dtype": HOSTILE, "targets_digest": HOSTILE, HOSTILE: HOSTILE}
    claim = verdict(HOSTILE, 1.0, 0.5, [0.8, 1.2]) | dict.fromkeys(("claim", "statement", "source", "reason"), HOSTILE)
    claim["notes"] = [HOSTILE]
    claim["checks"][0] |= dict.fromkeys(("statement", "verdict", "needs", "size"), HOSTILE)
    manifest = {HOSTILE: {HOSTILE: HOSTILE}, "commands": [HOSTILE]}
    text = write(tmp_path, evals=bad, verdicts=[claim], title=HOSTILE, notes=[HOSTILE], manifest=manifest).read_text()
    page = Page(text)
    assert [tag["alt"] is not None for tag in page.named("img")] == [True]  # the picture of the curves, no other
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert sum(kind != "application/json" for kind, _ in page.scripts) == 2
    assert not any("<" in body for kind, body in page.scripts if kind == "application/json")
    specs = [json.loads(body) for kind, body in page.scripts if kind == "application/json"]
    assert all("<img" not in trace["name"] for spec in specs for trace in spec["data"])
    assert page.text.count(HOSTILE) > 15  # shown as it is


def test_numbers_that_do_not_exist_are_null_and_said(tmp_path: Path) -> None:
    odd = evaluation("rope", [4.43, 9.05, 17.8, 29.6])
    odd["rows"][1] |= {"ppl": None, "nll": None, "ci95": [1.0, None]}
    odd["rows"][2] |= {"ppl": None, "nll": None, "bits_per_byte": None, "ci95": None, "status": "non-finite"}
    odd["rows"][3] |= {"ci95": [20.0, None]}
    claim = verdict("INCONCLUSIVE", 0.3, 0.5, [None, float("inf")])
    page = Page(write(tmp_path, evals=[odd], verdicts=[claim]).read_text())
    text = (tmp_path / "results.json").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert [row["ppl"] for row in json.loads(text)["evals"][0]["rows"]] == [4.43, None, None, 29.6]
    (line,) = [
        line for line in csv.DictReader(StringIO((tmp_path / "results.csv").read_text())) if line["ctx"] == "256"
    ]
    assert (line["ppl"], line["nll"], line["ci95_low"], line["ci95_high"]) == ("", "", "1.0", "")
    (table,) = [
        table for table in page.tables if table[0][0] == "Method" and len(table[0]) == 5 and "128" in table[0][1]
    ]
    assert table[1] == ["RoPE", "4.43|3.99 to 5.32", "non-finite", "non-finite", "29.6"]
    assert "θ = 0.30 (−∞ to ∞)" in page.text


@pytest.mark.parametrize(("evals", "verdicts"), [([], []), ([], VERDICTS), (EVALS, [])])
def test_what_is_missing_is_left_out(tmp_path: Path, evals: list[Any], verdicts: list[Any]) -> None:
    page = Page(write(tmp_path, evals=evals, verdicts=verdicts).read_text())
    names = [section["id"] for section in page.named("section")]
    assert ("verdicts" in names) == bool(verdicts)
    assert ("curves" in names) == ("numbers" in names) == ("context" in names) == bool(evals)
    assert bool(page.scripts) == bool(evals)
    assert (tmp_path / "curves.png").exists()
    if not evals and not verdicts:
        assert "nothing to report" in page.text


def test_prefix_tells_no_gain_but_its_window(tmp_path: Path) -> None:
    """Targets change with ctx, so lengths may not be compared; at one ctx a method and its window may."""
    plain, window = evaluation("rope", [4.43, 4.0], "prefix"), evaluation("rope", [4.43, 4.3], "prefix", window=128)
    page = Page(write(tmp_path, evals=[plain, window]).read_text())
    (table,) = [table for table in page.tables if table[0][-1] == "Reading"]
    assert table[1] == ["RoPE", "–", "4.00", "4.30|W = 128", "better than its own window, so it uses older tokens"]
    assert "the targets change with ctx" in page.text
    alone = Page(write(tmp_path, evals=[plain]).read_text())
    assert "context" not in [section["id"] for section in alone.named("section")]


def told(renderable: object, width: int = 110) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_terminal_table() -> None:
    text = told(report.terminal_table(results(EVALS)))
    cells = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines() if re.search("[│┃]", line)
    ]
    assert cells[0] == ["method", "128 (trained)", "256", "512", "1024"]
    # ± is half of 0.3 times the perplexity, with the decimals that the perplexity shows
    assert ["RoPE", "4.43 ±0.66", "9.05 ±1.36", "17.8 ±2.7", "29.6 ±4.4"] in cells
    assert ["learned", "5.46 ±0.82", "undefined", "undefined", "undefined"] in cells
    assert ["nonoverlapping", "", "", "", ""] in cells
    assert "last: the final 64 targets of each block" in text
    assert "64 documents, 3 left out as too short" in " ".join(text.split())
    assert "learned undefined past 128: the table ends at 128 positions" in " ".join(text.split())


@pytest.mark.parametrize(("console", "least", "most"), [(110, 77, 100), (80, 60, 80), (40, 20, 40)])
def test_caption_is_as_wide_as_the_console_allows(console: int, least: int, most: int) -> None:
    """Below a table of 30 columns the caption is not broken at 30; it breaks only where the next word has no room."""
    lines = [
        line.rstrip()
        for line in told(report.terminal_table(results([evaluation("rope", [4.43])])), console).splitlines()
    ]
    (end,) = [place for place, line in enumerate(lines) if line.startswith("└")]
    assert len(lines[end]) < 40
    caption = lines[end + 1 :]
    assert " ".join(caption).startswith("last: the final 64 targets of each block; the targets stay, only the context")
    assert " ".join(caption).endswith("targets last0123")
    assert all(least <= len(line) <= most for line in caption[:-1])
    assert all(len(line) + 1 + len(after.split()[0]) > most for line, after in itertools.pairwise(caption))


def test_table_without_an_evaluation_has_no_caption() -> None:
    assert told(report.terminal_table(results([]))).endswith("┘\n")


def test_terminal_shows_names_as_they_are() -> None:
    text = told(report.terminal_table(results([evaluation("[red]mine[/red]", [4.43])])))
    assert "[red]mine[/red]" in text
    claim = verdict("PASS", 1.28, 0.5, [1.05, 1.51]) | {"statement": "[bold]x[/bold] [/]"}
    assert "[bold]x[/bold] [/]" in told(report.verdict_table([claim]))


def test_verdict_table() -> None:
    text = told(report.verdict_table(VERDICTS))
    assert "✓ yarn8@8L < plain@8L by 0.5: θ = 1.28 (1.05 to 1.51), τ = 0.50" in text
    for word in ("PASS", "FAIL", "INCONCLUSIVE", "one seed", "c-yarn-8x: YaRN rescues 8L", "because"):
        assert word in text
    assert max(map(len, told(report.verdict_table(VERDICTS), 80).splitlines())) <= 80


def test_browser_draws_the_curves_and_runs_no_foreign_script(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    hostile = evaluation("rope", [5.0, 6.0, 7.0, 8.0], run=HOSTILE.replace("alert(1)", "document.title='taken'"))
    same = evaluation("rope", [4.0, 5.0, 6.0, 7.0], run="other")
    path = write(tmp_path / "page", evals=[hostile, same], title="Untouched")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    drawn = Page(done.stdout)
    assert "main-svg" in done.stdout
    assert len([tag for tag in drawn.named("path") if "js-line" in str(tag.get("class"))]) >= 2
    (still,) = [tag for tag in drawn.named("figure") if tag.get("id") == "still"]
    assert "hidden" in still  # the picture gives way to the curves
    assert "<title>Untouched</title>" in done.stdout
