"""What is told apart and what is joined: evaluations that differ in a parameter, a recipe, a seed, a ladder."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from ropelab import config, evaluation, report, training
from ropelab.analysis import diagnose_run
from ropelab.config import Method
from ropelab.evaluation import evaluations
from ropelab.report import figures
from ropelab.runs import RunDir
from tests.lab import invoke
from tests.records import result
from tests.test_experiment import enlarged, settings

matplotlib.use("Agg")
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0]  # of 8 pairs


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> RunDir:
    """A run of its own for each test, as far as its results go."""
    return trained(folder, tmp_path, "pos=rope", "seed=11")


def trained(folder: Path, place: Path, *changes: str) -> RunDir:
    resolved = settings(folder, "train.dtype=fp32", f"runs_dir={place / 'runs'}", *changes)
    return enlarged(RunDir(Path(training.train(resolved)["run_dir"])))


def ask(run: RunDir, folder: Path, ctx: str, scaling: tuple[str, ...] = (), *changes: str) -> dict[str, Any]:
    asked = settings(folder, "eval.protocol=last", "eval.last=4", "eval.tokens=200", f"eval.ctx={ctx}", *changes).eval
    method = config.load(list(scaling)).scaling if scaling else Method("none", {})
    return evaluation.evaluate(run, asked, scaling=method, cache_dir=str(folder / "cache")).result.to_json()


def lines(evals: list[dict[str, Any]]) -> dict[str, figures.Line]:
    found = [line for panel in figures.panels(evals) for line in panel.lines]
    assert len({line.name for line in found}) == len(found)
    return {line.name: line for line in found}


YARN = ("scaling=yarn", "scaling.factor=8")
PAIRS = [
    (YARN, (*YARN, "scaling.ramp=rotations"), "RoPE + YaRN ×8", "RoPE + YaRN ×8 (ramp=rotations)"),
    (("scaling=rerope",), ("scaling=rerope", "scaling.window=6"), "RoPE + ReRoPE", "RoPE + ReRoPE (window=6)"),
    (
        ("scaling=longrope", "scaling.factor=4", f"scaling.long_factors={FACTORS}".replace(" ", "")),
        ("scaling=longrope", "scaling.factor=4", f"scaling.long_factors={[*FACTORS[:-1], 4.5]}".replace(" ", "")),
        None,
        None,
    ),
]


@pytest.mark.parametrize(("one", "other", "name", "other_name"), PAIRS)
def test_parameters_tell_evaluations_apart(
    run: RunDir, folder: Path, tmp_path: Path, one: Any, other: Any, name: str | None, other_name: str | None
) -> None:
    """In curves, tables, CSV, the diagnosis and the page, each under a name and with the numbers of its own."""
    plain = ask(run, folder, "16,64")
    results = [ask(run, folder, "16,64", scaling) for scaling in (one, other)]
    assert results[0]["rows"][1]["nll"] != results[1]["rows"][1]["nll"]
    evals = evaluations(run)
    assert len(evals) == 3
    drawn = lines(evals)
    assert len(drawn) == 3
    if name is not None and other_name is not None:
        assert set(drawn) == {"RoPE", name, other_name}
        for label, result in ((name, results[0]), (other_name, results[1])):
            assert drawn[label].points[-1].nll == result["rows"][1]["nll"]
    colours = figures.styles(figures.panels(evals))
    assert len({(style.colour, style.dash) for style in colours.values()}) == 3
    diagnosed = diagnose_run(run.manifest(), evals)
    assert sorted(one["losses"][-1][1] for one in diagnosed["evaluated"]) == sorted(
        item["rows"][1]["nll"] for item in (plain, *results)
    )
    report.write_report(
        tmp_path / "r", evals=evals, verdicts=[], title="t", notes=[], manifest={}, diagnoses=[diagnosed]
    )
    rows = list(csv.DictReader((tmp_path / "r" / "results.csv").read_text(encoding="utf-8").splitlines()))
    told = [(row["scaling"], row["scaling_changed"], row["factor"], row["ctx"], row["targets_digest"]) for row in rows]
    assert len(set(told)) == len(told) == 6


def test_the_commands_of_a_report_give_its_numbers_again(run: RunDir, folder: Path, tmp_path: Path) -> None:
    """Each `ropelab eval` of the page, typed on a run without results."""
    asked = [pair[place] for pair in PAIRS for place in (0, 1)]
    asked += [(*YARN, "scaling.attention_factor=1.5", "scaling.truncate=false"), ("scaling=block_causal",)]
    stored = {json.dumps(ask(run, folder, "16,64", one)["rows"]) for one in asked}
    stored.add(json.dumps(ask(run, folder, "16,64", (), "eval.baseline=unigram")["rows"]))
    page = report.write_report(tmp_path / "r", evals=evaluations(run), verdicts=[], title="t", notes=[], manifest={})
    text = page.read_text(encoding="utf-8").replace("&#x27;", "'").replace("&quot;", '"').replace("&#39;", "'")
    commands = re.findall(r"^(?:.*>)?(ropelab eval [^<\n]*)", text, re.M)
    assert len(commands) == len(asked) + 1
    for path in run.results.iterdir():
        path.unlink()
    again = set()
    for command in commands:
        words = shlex.split(command)[1:]
        places = [f"runs_dir={run.path.parent}", f"cache_dir={folder / 'cache'}"]
        done = invoke(*words, *places, "--json")
        assert done.exit_code == 0, (command, done.stderr)
        again.add(json.dumps(json.loads(done.stdout)["rows"]))
    assert again == stored


def test_ladders_of_one_question_are_one_line(run: RunDir, folder: Path) -> None:
    """16,32,64 then 16,64 and 16,48,64: every number that was measured is there."""
    for ctx in ("16,32,64", "16,64", "16,48,64"):
        for scaling in ((), ("scaling=yarn", "scaling.factor=auto")):
            ask(run, folder, ctx, scaling)
    drawn = lines(evaluations(run))
    assert {name: [point.ctx for point in line.points] for name, line in drawn.items()} == {
        "RoPE": [16, 32, 48, 64],
        "RoPE + YaRN ×4": [16, 32, 48, 64],
    }


def test_other_targets_are_not_joined(run: RunDir, folder: Path) -> None:
    ask(run, folder, "16,64")
    ask(run, folder, "16,32")
    assert [[row.ctx for row in item.rows] for item in evaluations(run)] in (
        [[16, 64], [16, 32]],
        [[16, 32], [16, 64]],
    )


def test_seeds_are_averaged_and_recipes_are_not(folder: Path, tmp_path: Path) -> None:
    """Two seeds of one recipe are a line; another base, or other steps, at another seed is a line of its own."""
    runs = [
        trained(folder, tmp_path, "pos=rope", "seed=1"),
        trained(folder, tmp_path, "pos=rope", "seed=2"),
        trained(folder, tmp_path, "pos=rope", "pos.base=500", "seed=3"),
        trained(folder, tmp_path, "pos=rope", "train.steps=4", "train.checkpoint_every=99", "seed=4"),
    ]
    for run in runs[:3]:
        ask(run, folder, "16,32")
    evals = [item for run in runs[:3] for item in evaluations(run)]
    drawn = lines(evals)
    assert set(drawn) == {"RoPE", "RoPE (base=500)"}
    assert drawn["RoPE"].runs == (runs[0].name, runs[1].name)
    evaluation.evaluate(
        runs[3], settings(folder, "eval.protocol=last", "eval.last=4", "eval.tokens=200", "eval.ctx=16,32").eval,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    with_steps = lines([*evals, *evaluations(runs[3])])
    assert len(with_steps) == 3
    assert any(name.endswith(f"({runs[3].name})") for name in with_steps)
    parents = [config.load([f"parent={run.name}", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={folder / 'cache'}",
                            "train.steps=1"], parent=run.manifest()["config"]) for run in runs[:2]]  # fmt: skip
    children = [RunDir(Path(training.train(resolved)["run_dir"])) for resolved in parents]
    for child in children:
        ask(child, folder, "16,32")
    assert len(lines([item for child in children for item in evaluations(child)])) == 1


def test_losses_on_other_targets_are_not_drawn_on_one_axis(run: RunDir, folder: Path) -> None:
    """YaRN on the targets of the plain run is a line of the picture; PI on others is named in the caption."""
    from ropelab.report.figures.breakdown import diagnosis_parts

    ask(run, folder, "16,64")
    ask(run, folder, "16,64", YARN)
    ask(run, folder, "16,32", ("scaling=linear", "scaling.factor=2"))
    found = diagnose_run(run.manifest(), evaluations(run))
    assert len(found["evaluated"]) == 3
    part = diagnosis_parts({"diagnosis": found, "train_ctx": 16})[0]
    axes = matplotlib.figure.Figure().add_subplot()
    part.draw(axes)
    assert {text.get_text() for text in axes.texts} >= {"none", "YaRN ×8"}
    assert "PI ×2" not in {text.get_text() for text in axes.texts}
    assert "on other targets: 1 more" in part.caption
    (plain,) = (one for one in found["evaluated"] if one["scaling"] == "none")
    (yarn,) = (one for one in found["evaluated"] if one["scaling"] == "yarn")
    assert plain["targets"] == yarn["targets"]


def test_a_scaling_whose_parameters_leave_everything_alone_says_so(run: RunDir, folder: Path) -> None:
    common = [run.path, "--ctx", "16,64", "--protocol", "last", "eval.last=4", f"cache_dir={folder / 'cache'}"]
    idle = [["--scaling", "self_extend", "scaling.group=1"], ["--scaling", "block_causal", "scaling.block=500"],
            ["--scaling", "rerope", "scaling.window=500", "scaling.log_scaling=false"],
            ["--scaling", "yarn", "--factor", "1"]]  # fmt: skip
    for words in idle:
        done = invoke("eval", *common, *words, "--json")
        assert done.exit_code == 0
        assert "changes nothing at these lengths" in done.stderr, words
    done = invoke("eval", *common, "--scaling", "self_extend", "--json")
    assert "changes nothing" not in done.stderr


def test_a_factors_file_is_not_contradicted(run: RunDir, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"long_factors": FACTORS, "factor": 4, "start_tokens": 2, "attention_factor": 1.1}))
    common = ["eval", str(run.path), "--ctx", "64", f"cache_dir={folder / 'cache'}", "--scaling", "longrope"]
    for more in (["--factor", "8"], ["scaling.start_tokens=0"], ["scaling.long_factors=[1.0]"]):
        done = invoke(*common, f"scaling.factors={file}", *more)
        assert done.exit_code == 2
        assert "leave one of them out" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert invoke(*common, f"scaling.factors={file}", "--factor", "4").exit_code == 0


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [{"ctx": 10**39, "status": "ok"}]}, {"rows": [{"ctx": 2**41, "status": "ok"}]},
        {"train_ctx": 2**63 - 1}, {"seed": 10**30}, {"rows": [{"ctx": 64, "status": "ok", "tokens": 2**64}]},
        {"rows": []}, {"train_ctx": 0},
        {"position_curve": {"ctx": 8, "edges": [], "nll": [1.0]}}, {"protocol": {"name": "../../etc"}},
        {"protocol": {"name": "last", "authors": "x"}}, {"rows": [{"ctx": 64, "status": "ok", "ppl": float("nan")}]},
    ],
)  # fmt: skip
def test_an_evaluation_with_what_cannot_be_is_none(change: dict[str, Any]) -> None:
    """Of a stranger: lengths that no text has, numbers that no tensor holds, other shapes."""
    whole = {"run": "r", "pos": "rope", "scaling": "none", "train_ctx": 64, "protocol": {"name": "last"},
             "rows": [{"ctx": 64, "status": "ok"}]}  # fmt: skip
    assert result(whole).rows[0].ctx == 64
    with pytest.raises(ValueError, match=r"rows|train_ctx|seed|position_curve|protocol"):
        result({**whole, **change})
