"""Sweeps on this machine: Hydra's grammar, checks before anything starts, real worker processes, kills, and re-runs."""

from __future__ import annotations

import io
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from ropelab import cli, runs, sweeps
from ropelab import config as configs
from ropelab.config import LocalLauncher, SlurmLauncher
from ropelab.config import sweep_grammar as grammar
from ropelab.errors import RunError, SchedulerError
from ropelab.sweeps import Sweep, control
from ropelab.sweeps.launchers import local
from ropelab.sweeps.launchers import slurm as slurm_launcher
from tests.lab import TINY, Process, changed, tiny, waited_for

Run = Callable[..., tuple[int, str, str]]
SMALL = (*TINY, "eval.ctx=64")
# that take their time: a small batch, so that most of it is not the validation at the end
LONG = ("train.steps=700", "train.eval_every=700", "train.checkpoint_every=100", "train.batch_size=4")


@pytest.fixture
def ropelab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ropelab", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        status = ended.value.code
        assert status is None or isinstance(status, int)
        assert "Traceback" not in told.err
        return status or 0, told.out, told.err

    return run


@pytest.fixture
def here(home: Path, forked_workers: None, tmp_path: Path) -> tuple[str, ...]:
    """Settings of a sweep of tiny runs in a folder of its own, with workers that are forked.

    Those of a sweep that is a process of its own are started as always.
    """
    folders = f"data.path={home / 'corpus'}", f"cache_dir={home / 'cache'}", f"runs_dir={tmp_path / 'runs'}"
    return (*SMALL, *folders)


def weights(runs_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {run.name: run.load_weights() for run in runs.all_runs(runs_dir)}


def assert_equal(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in found.items():
        assert tensors.keys() == expected[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[name][key]), f"{name} {key}"


# --- the grammar ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "points"),
    [
        (["pos=rope,alibi", "seed=range(0,2)"],
         [["pos=rope", "seed=0"], ["pos=rope", "seed=1"], ["pos=alibi", "seed=0"], ["pos=alibi", "seed=1"]]),
        (["pos=glob(kerple*)"], [["pos=kerple_log"], ["pos=kerple_power"]]),
        (["pos=glob([kerple*,x*],exclude=*log)"], [["pos=kerple_power"], ["pos=xpos"]]),
        (["seed=choice(3,5)"], [["seed=3"], ["seed=5"]]),
        (["seed=sort(3,1,2,reverse=true)"], [["seed=3"], ["seed=2"], ["seed=1"]]),
        (["train.lr=1e-3,2e-3"], [["train.lr=0.001"], ["train.lr=0.002"]]),
        (["train.grad_clip=null,0.5"], [["train.grad_clip=null"], ["train.grad_clip=0.5"]]),
        (["train.compile=true,null"], [["train.compile=true"], ["train.compile=null"]]),
        (["train.keep=[0.5,0.25],[]"], [["train.keep=[0.5,0.25]"], ["train.keep=[]"]]),
        (["eval.scalings=[none],[none,yarn:8]"], [["eval.scalings=[none]"], ["eval.scalings=[none,yarn:8]"]]),
        (["eval.scalings=[none,yarn:8]"], [["eval.scalings=[none,yarn:8]"]]),  # one list is one value
        (["eval.ctx=512,8192"], [["eval.ctx=512,8192"]]),  # a ladder is one value
        (["data.path=/x/a(b, c"], [["data.path=/x/a(b, c"]]),  # not of the grammar: as it stands
        (["data.path='/x/a,b',/y"], [["data.path=/x/a,b"], ["data.path=/y"]]),
    ],
)  # fmt: skip
def test_values_are_expanded_as_hydra_does(overrides: list[str], points: list[list[str]]) -> None:
    assert grammar.expand(overrides) == points


@examples(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True), min_size=1, max_size=3))
def test_the_points_are_the_product_of_all_values(values: list[list[int]]) -> None:
    """Every combination is there once, the last key turning fastest, whatever the values are."""
    keys = ["seed", "train.steps", "train.ctx"][: len(values)]
    points = grammar.expand([f"{key}={','.join(map(str, of))}" for key, of in zip(keys, values, strict=True)])
    expected: list[list[str]] = [[]]
    for key, of in zip(keys, values, strict=True):
        expected = [[*point, f"{key}={value}"] for point in expected for value in of]
    assert points == expected


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=interval(0,1)"], "use a,b or range"),
        (["seed=range(3,0)"], "stands for no value"),
        (["pos=glob(nothing*)"], "stands for no value"),
        (["seed=range(0,2"], "is not understood"),
        (["seed=range(0,100000000)"], "at most 10000 points"),
        (["seed=range(0,200)", "train.steps=range(1,200)"], "come to 39800 points"),
        (["seed=0,1", "seed=2"], "seed is given twice"),
        (["seed=range(0,2),7"], "one of several values"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grammar.expand(overrides)


@pytest.mark.parametrize("name", configs.choices("sweep"))
def test_shipped_sweeps_compose(name: str) -> None:
    points = grammar.expand(grammar.named_sweep(name))
    assert len(points) > 1
    for point in points:
        configs.load(point)


@pytest.mark.parametrize(
    "text", ["pos: rope\nseed: 1\npos: t5\n", "- a\n- b\n", "pos: [rope, alibi]\n", "", "pos: {a: 1}\n", "a: b: c\n"]
)
def test_a_sweep_file_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        grammar.named_sweep(str(tmp_path / "mine.yaml"))


def test_launcher_settings_are_read_by_their_types() -> None:
    slurm = configs.launcher("slurm", ["launcher.partition=gpu", "launcher.gpus=2", "launcher.setup=[module load x]"])
    assert isinstance(slurm, SlurmLauncher)
    assert (slurm.partition, slurm.gpus, slurm.setup, slurm.account) == ("gpu", 2, ("module load x",), None)
    assert configs.launcher("local", []) == LocalLauncher(jobs=None, stack=1)
    for name, override, said in (
        ("slurm", "launcher.gpu=1", "did you mean launcher.gpus"),
        ("slurm", "launcher.time_min=0", ">= 1"),
        ("slurm", "launcher.mem_gb=lots", "takes a number"),
        ("local", "launcher.partition=x", "no setting"),
        ("sge", "", "unknown launcher"),
    ):
        with pytest.raises(ValueError, match=said):
            configs.launcher(name, [override] if override else [])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("['module load cuda, gcc']", ["module load cuda, gcc"]),
        ('["export A=1,2", ulimit -n 4096]', ["export A=1,2", "ulimit -n 4096"]),
        ("['echo \"a, b\"', [ -d x ]]", ['echo "a, b"', "[ -d x ]"]),
        ("['echo it's, ok', x]", ["echo it's, ok", "x"]),
        ("[it's]", ["it's"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_a_line_of_the_launcher_may_hold_a_comma(text: str, lines: list[str]) -> None:
    slurm = configs.launcher("slurm", [f"launcher.setup={text}"])
    assert isinstance(slurm, SlurmLauncher)
    assert list(slurm.setup) == lines
    typed = shlex.split(control._typable("launcher.setup=", lines))  # as `retry` says it is typed
    assert configs.launcher("slurm", typed) == slurm


@pytest.mark.parametrize("text", ['[echo "a,b"]', "['a, b]", "[a 'b, c']", '["a, b]'])
def test_a_line_that_a_comma_would_tear_is_refused_with_the_fix(text: str) -> None:
    with pytest.raises(ValueError, match=r"write the whole item in quotes, such as launcher\.setup=\['export A=1,2'\]"):
        configs.launcher("slurm", [f"launcher.setup={text}"])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs values to combine"),
        (["nosuch"], "unknown sweep 'nosuch'"),
        (["pos=ropes"], "did you mean rope"),
        (["pos=rope", "trian.lr=1"], "unknown key 'trian.lr'"),
        (["pos=rope", "+x=1"], "are not supported"),
        (["pos=rope", "--launcher", "slrum"], "unknown launcher 'slrum'"),
        (["pos=rope", "--launcher", "local", "launcher=slurm"], "given 2 times"),
        (["pos=rope", "--wait"], "--wait belongs to --launcher slurm"),
        (["pos=rope", "--emit-sbatch"], "--emit-sbatch belongs to"),
        (["pos=rope", "--emit-sbatch", "--dry-run", "--launcher", "slurm"], "leave out one of"),
        (["pos=rope", "runs_dir=a,b"], "runs_dir takes one value"),
        (["pos=rope", "device=cpu,auto"], "device takes one value"),
        (["pos=rope", "launcher.jobs=0"], "launcher.jobs must be >= 1"),
        (["pos=rope", "hydra/launcher=basic", "--launcher", "slurm"], "give one of them"),
        (["pos=rope", "hydra.job.chdir=false", "--dry-run"], "knows no --dry-run"),
        (["pos=rope", "hydra/launcher=basic", "--json"], "knows no --json"),
        (["pos=rope", "hydra/launcher=basic", "--emit-sbatch"], "knows no --emit-sbatch"),
        (["pos=rope", "hydra/launcher=basic", "--wait"], "knows no --wait"),
        (["pos=rope", "hydra/launcher=basic", "--skip-invalid"], "knows no --skip-invalid"),
        (["pos=rope", "hydra.=1"], "Hydra takes no hydra.=1"),
        (["pos=rope", "hydra/=x"], "Hydra takes no hydra/=x"),
        (["pos=rope", "hydra/launcher=nosuch"], "Could not find 'hydra/launcher/nosuch'"),
        (["pos=rope", "hydra.nosuch=1"], "Could not override 'hydra.nosuch'"),
        (["pos=rope", "hydra.job.chdir=[1"], "Hydra takes no hydra.job.chdir=[1"),
        (["pos=rope", "trian.lr=1", "hydra/launcher=basic"], "did you mean train.lr"),
        (
            ["data=text", "data.path=/x/a(b", "hydra/launcher=basic"],
            "Hydra, which makes the points with hydra/launcher",
        ),
        (["pos=rope,alibi", "seed=0,1", "model.width=64,128"], "did you mean model.d_model?"),
        (["pos=rope", "eval.protocol=nonsense"], "eval.protocol must be one of"),
    ],
)
def test_mistakes_end_with_2_before_anything_is_written(
    ropelab: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = ropelab("sweep", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*"))


def test_a_mistake_of_several_points_is_said_once(ropelab: Run, here: tuple[str, ...]) -> None:
    status, _, err = ropelab(
        "sweep", "seed=0,1,2", "train.lr=1e-3,x", "model.n_layer=1,y", *(item for item in here if "n_layer" not in item)
    )
    assert status == 2
    assert err.splitlines() == [
        "invalid: seed=0 train.lr=0.001 model.n_layer=y and 2 more points: model.n_layer takes a whole number, not 'y'",
        "invalid: seed=0 train.lr=x model.n_layer=1 and 5 more points: train.lr takes a number, not 'x'",
        "ropelab: 9 of 12 points cannot be; --skip-invalid leaves them out",
    ]


def test_invalid_points_are_listed_and_can_be_left_out(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("sweep", "pos=rope,alibi", "eval.scalings=[none,yarn]", *here)
    status, _, err = ropelab(*asked)
    assert status == 2
    assert "invalid: pos=alibi, evaluated with yarn: scaling=yarn applies to" in err
    assert "1 of 2 points cannot be; --skip-invalid" in err
    assert not (tmp_path / "runs" / "sweeps").exists()
    status, out, err = ropelab(*asked, "--skip-invalid", "--dry-run", "--json")
    assert status == 0
    tasks = json.loads(out)["tasks"]
    assert [[one["scaling"] for one in task["evaluations"]] for task in tasks] == [["none", "yarn"], ["none"]]
    status, _, err = ropelab("sweep", "pos=alibi", "scaling=yarn,linear", "--skip-invalid", *here)
    assert status == 2
    assert "no point of this sweep can be" in err
    assert not (tmp_path / "runs" / "sweeps").exists()


def test_slurm_without_slurm_is_said(ropelab: Run, here: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    status, _, err = ropelab("sweep", "pos=rope", "--launcher", "slurm", *here)
    assert status == 2
    assert "not on PATH" in err
    monkeypatch.setenv("SLURM_CONF", "/nosuch/slurm.conf")
    status, _, err = ropelab("sweep", "pos=rope", "--launcher", "slurm", *here)
    assert status == 2
    assert "SLURM_CONF=/nosuch/slurm.conf names no file" in err


# --- real work ------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_evaluates_and_does_nothing_twice(
    ropelab: Run, here: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("sweep", "pos=rope,alibi", "seed=0,1", "eval.protocol=last", "eval.last=8", *here)
    status, out, err = ropelab(*asked, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert [one["state"] for one in told["runs"]] == ["DONE"] * 4
    assert [(item["pos"], item["seed"]) for item in told["results"]] == [
        ("rope", 0), ("rope", 1), ("alibi", 0), ("alibi", 1),
    ]  # fmt: skip
    assert {item["protocol"]["name"] for item in told["results"]} == {"last"}

    monkeypatch.setattr(local, "_start", pytest.fail)  # whatever starts now is one too many
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    status, out, err = ropelab(*asked, "--json")
    assert status == 0
    assert json.loads(out)["results"] == told["results"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")} == before

    (name,) = [path.name for path in sweeps.all_sweeps(tmp_path / "runs")]
    status, _, err = ropelab("report", name, f"runs_dir={tmp_path / 'runs'}", "-o", str(tmp_path / "page"))
    assert status == 0, err
    rows = (tmp_path / "page" / "results.csv").read_text(encoding="utf-8")
    assert rows.count("rope") >= 2
    for command in ("eval", "show", "export"):  # which are of one run
        for asked_for in (name, str(tmp_path / "runs" / "sweeps" / name)):
            rest = ("-o", str(tmp_path / "out")) if command == "export" else ()
            status, _, err = ropelab(command, asked_for, f"runs_dir={tmp_path / 'runs'}", *rest)
            assert status == 2
            assert "is a sweep of several runs" in err.strip()


def test_a_missing_result_is_made_again_and_only_that(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("sweep", "pos=rope,alibi", *here)
    assert ropelab(*asked)[0] == 0
    (sweep,) = [Sweep(path) for path in sweeps.all_sweeps(tmp_path / "runs")]
    before = weights(tmp_path / "runs")
    for file in sweep.run(1).results.iterdir():
        file.unlink()
    stands = sweeps.standings(sweep)
    assert [one.state for one in stands] == ["DONE", "LOST"]
    said = sweep.answer(0)
    status, out, _ = ropelab("retry", f"runs_dir={tmp_path / 'runs'}", "--json")
    assert status == 0
    assert [one["state"] for one in json.loads(out)["runs"]] == ["DONE", "DONE"]
    assert Sweep(sweep.path).answer(0) == said
    assert_equal(weights(tmp_path / "runs"), before)


def test_a_lost_run_is_in_no_average_and_the_page_is_the_sweeps_own(
    ropelab: Run, here: tuple[str, ...], tmp_path: Path
) -> None:
    """What was asked of the runs besides is not the sweep's; what is gone is nobody's."""
    where = f"runs_dir={tmp_path / 'runs'}"
    assert ropelab("sweep", "seed=0,1,2", *changed(here, "eval.ctx=32,"))[0] == 0
    sweep = sweeps.find_sweep(None, tmp_path / "runs")
    assert (
        ropelab("eval", sweep.run(0).name, where, "--ctx", "64", f"cache_dir={sweep.tasks[0]['config']['cache_dir']}")[
            0
        ]
        == 0
    )

    def shown() -> list[tuple[str, int]]:
        assert ropelab("report", sweep.name, where, "-o", str(tmp_path / "page"))[0] == 0
        evals = json.loads((tmp_path / "page" / "results.json").read_text(encoding="utf-8"))["evals"]
        return sorted((one["run"], row["ctx"]) for one in evals for row in one["rows"])

    assert shown() == sorted((sweep.run(task).name, 32) for task in range(3))
    out = ropelab("collect", sweep.name, where)[1]
    assert "±" in out
    assert "interval over seeds" in " ".join(out.split())
    assert ropelab("runs", "rm", "--yes", sweep.run(2).name, where)[0] == 0
    status, out, _ = ropelab("collect", sweep.name, where, "--json")
    assert status == 1
    assert sorted(one["seed"] for one in json.loads(out)["results"]) == [0, 1]
    out = ropelab("collect", sweep.name, where)[1]
    assert "±" not in out
    assert "in brackets the two seeds" in " ".join(out.split())
    assert shown() == sorted((sweep.run(task).name, 32) for task in range(2))


def test_a_length_that_no_text_has_is_refused_before_training(
    ropelab: Run, here: tuple[str, ...], tmp_path: Path
) -> None:
    status, _, err = ropelab("sweep", "pos=rope,alibi", *changed(here, "eval.ctx=999999"))
    assert status == 2
    assert "no test document is long enough for ctx 999999" in err
    assert len(err.splitlines()) == 1  # one mistake, said once
    assert not (tmp_path / "runs" / "sweeps").exists()


def short_text(folder: Path, n: int, letters: int) -> Path:
    """n documents of so many random letters, all of them test text but the first 20."""
    source = random.Random(n)
    for number in range(n):
        place = folder / ("train" if number < 20 else "test") / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(source.choices("abcdefgh ", k=letters)))
    return folder


@pytest.mark.parametrize(("letters", "ctx"), [(300, None), (100, "64"), (40, "32")])
def test_the_default_ladder_ends_where_the_documents_do(
    ropelab: Run, here: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture, letters: int, ctx: str | None
) -> None:
    """To 8 x train.ctx = 256, and no further than 6 documents hold; what is typed stays."""
    text = short_text(tmp_path / "text", 28, letters)
    mine = tuple(item for item in changed(here, f"data.path={text}") if not item.startswith("eval.ctx"))
    status, out, _ = ropelab("sweep", "pos=rope,alibi", *mine, "--dry-run", "--json")
    assert status == 0
    asked = [one["eval"]["ctx"] for task in json.loads(out)["tasks"] for one in task["evaluations"]]
    assert asked == [ctx, ctx]
    assert ("too short for ctx 256" in caplog.text) == (ctx is not None)
    if ctx is not None:
        status, _, err = ropelab("sweep", "pos=rope,alibi", *mine, "eval.ctx=256", "--dry-run")
        assert (status, "no test document is long enough for ctx 256" in err) == (2, True)


def test_one_failure_leaves_the_others_alone(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    diverges = ("train.lr=1e-3,1e30", "train.warmup_steps=0")
    status, out, err = ropelab("sweep", "pos=rope", *diverges, *here, "--json")
    assert status == 1
    assert [one["state"] for one in json.loads(out)["runs"]] == ["DONE", "FAILED"]
    assert len(json.loads(out)["results"]) == 1
    assert "FAILED: rope-text" in err
    assert "at step 2" in err
    assert "1 of 2 runs are not done" in err
    status, out, _ = ropelab("status", f"runs_dir={tmp_path / 'runs'}")
    assert status == 0
    assert "the loss became" in out


def test_a_killed_sweep_goes_on_to_the_same_numbers(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    """Killed with -9: its workers save and end by themselves, `status` says LOST, `retry` finishes."""
    straight = changed(here, f"runs_dir={tmp_path / 'straight'}", *LONG)
    assert ropelab("sweep", "pos=rope,alibi", *straight)[0] == 0
    process = Process(cli.main, "sweep", "pos=rope,alibi", *changed(here, *LONG))
    runs_dir = tmp_path / "runs"

    def steps() -> list[int]:
        found = sweeps.all_sweeps(runs_dir)
        return [one.step or 0 for one in sweeps.standings(Sweep(found[-1]))] if found else [0]

    waited_for(lambda: min(steps()) > random.Random(3).randint(20, 250))
    workers = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # the time that they take to save and end
    process.kill()
    process.wait()
    alive = sweeps.standings(sweeps.find_sweep(None, runs_dir))
    said = ropelab("cancel", f"runs_dir={runs_dir}")[2]
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    process.communicate()
    assert [one.state for one in alive] == ["RUNNING", "RUNNING"]
    assert "its process is gone, and 2 of its runs save themselves and end" in said
    waited_for(lambda: all(run.status() == "interrupted" for run in runs.all_runs(runs_dir)))
    stands = sweeps.standings(sweeps.find_sweep(None, runs_dir))
    assert [one.state for one in stands] == ["LOST", "LOST"]
    saved = [max(run.path.glob("checkpoints/step-*")).name for run in runs.all_runs(runs_dir)]
    assert any(not name.endswith("00") for name in saved)  # saved when left alone, not at the 100th step before
    assert ropelab("retry", f"runs_dir={runs_dir}")[0] == 0
    assert_equal(weights(runs_dir), weights(tmp_path / "straight"))


def test_a_run_that_two_sweeps_share_is_trained_once(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    """The second sweep waits for the run that the first one trains."""
    long = changed(here, "train.steps=500", "train.eval_every=500", "train.batch_size=4")
    first = Process(cli.main, "sweep", "pos=rope", *long)
    waited_for(lambda: any(run.metrics() for run in runs.all_runs(tmp_path / "runs")))
    status, out, err = ropelab("sweep", "pos=rope,alibi", *long, "--json")
    assert status == 0, err
    assert [one["state"] for one in json.loads(out)["runs"]] == ["DONE", "DONE"]
    first.communicate()
    assert first.returncode == 0
    (shared, _) = Sweep(sweeps.all_sweeps(tmp_path / "runs")[-1]).tasks
    assert [line["step"] for line in runs.RunDir(tmp_path / "runs" / shared["run"]).metrics()] == list(range(1, 501))


def test_runs_are_listed_and_removed_by_what_they_have(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    where = f"runs_dir={tmp_path / 'runs'}"
    assert ropelab("sweep", "pos=rope,alibi", "train.lr=1e-3,2e-3", *here)[0] == 0

    def listed(*wanted: str) -> list[str]:
        status, out, err = ropelab("runs", where, *wanted, "--json")
        assert status == 0, err
        return sorted(one["run"].partition("-")[0] for one in json.loads(out))

    assert listed() == ["alibi", "alibi", "rope", "rope"]
    assert listed("pos=alibi", "train.lr=0.001") == ["alibi"]
    assert listed("pos.base=1e4", "status=done") == ["rope", "rope"]
    assert listed("seed=1") == listed("status=failed") == listed("pos=alibi", "pos.base=1e4") == []
    for wanted, said in (
        ("ops=rope", "did you mean pos?"),
        ("pos=ropee", "did you mean rope"),
        ("status=dnoe", "done"),
        ("train.lrs=1", "did you mean train.lr?"),
    ):
        status, _, err = ropelab("runs", where, wanted)
        assert status == 2
        assert said in err
    assert ropelab("runs", "rm", where, "pos=alibi", "train.lr=2e-3", "--yes")[0] == 0
    assert listed("train.lr=1e-3,2e-3") == ["alibi", "rope", "rope"]
    assert "name" in ropelab("runs", "rm", where)[2]


def test_cancel_stops_a_sweep_of_another_process(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    where = f"runs_dir={tmp_path / 'runs'}"
    asked = ("sweep", "pos=rope,alibi", "launcher.jobs=1", *changed(here, "train.steps=100000"))
    process = Process(cli.main, *asked)
    waited_for(lambda: any(run.metrics() for run in runs.all_runs(tmp_path / "runs")))
    status, _, err = ropelab(*asked)
    assert status == 2
    assert "is being worked on by another process" in err
    assert ropelab("cancel", where)[0] == 0
    _, err = process.communicate()
    assert process.returncode == 143
    assert "goes on" in err
    status, out, _ = ropelab("status", where, "--json")
    assert status == 0
    notes = [(one["state"], one["note"]) for one in json.loads(out)["runs"]]
    assert [state for state, _ in notes] == ["CANCELLED", "CANCELLED"]  # at most one of them ran
    assert "saved at step" in notes[0][1]
    assert notes[1][1] == "not started"
    status, _, err = ropelab("collect", where)
    assert status == 1
    assert "2 of 2 runs are not done" in err
    assert "nothing of it is waiting or running" in ropelab("cancel", where)[2]


def test_alike_runs_can_share_a_stack(ropelab: Run, here: tuple[str, ...], tmp_path: Path) -> None:
    """Two seeds trained in one batched step are two runs with results, like any others."""
    status, out, err = ropelab("sweep", "pos=rope", "seed=0,1", "launcher.stack=2", *here, "--json")
    assert status == 0, err
    assert [one["state"] for one in json.loads(out)["runs"]] == ["DONE", "DONE"]
    assert [run.manifest()["stacked"] for run in runs.all_runs(tmp_path / "runs")] == [2, 2]


# --- the launcher ---------------------------------------------------------------------------------------------------


class Recorded:
    """Workers that only say what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[int, int, str | None]] = []
        self.most = 0
        self._running = 0
        monkeypatch.setattr(local, "_start", self._start)

    def _start(self, task: dict[str, Any], index: int, lines: local.Lines, gpu: str | None = None) -> Any:
        self.given.append((index, task["threads"], gpu))
        self._running += 1
        self.most = max(self.most, self._running)
        recorded = self

        class Process:
            stdin = io.StringIO()

            def wait(self) -> int:
                recorded._running -= 1
                return 0

        lines.put((index, {"train": index}))
        lines.put((index, None))
        return Process()


def test_each_gpu_gets_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    ended: list[int] = []
    answers, stopped = local.run_side_by_side(
        [{}] * 5, slots=8, gpus=["0", "3"], progress=lambda *_, **__: None, ended=lambda index, _: ended.append(index)
    )
    assert (stopped, [answer["train"] for answer in answers], sorted(ended)) == (None, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert recorded.most == 2
    assert {gpu for _, _, gpu in recorded.given} == {"0", "3"}
    assert {threads for _, threads, _ in recorded.given} == {4}  # the cores are shared between the two


@pytest.mark.parametrize(("jobs", "slots", "most", "threads"), [(1, 8, 1, 8), (3, 8, 3, 2), (4, 2, 4, 1)])
def test_the_cap_holds(monkeypatch: pytest.MonkeyPatch, jobs: int, slots: int, most: int, threads: int) -> None:
    recorded = Recorded(monkeypatch)
    local.run_side_by_side([{}] * 6, slots=slots, jobs=jobs, progress=lambda *_, **__: None)
    assert recorded.most == most
    assert {given for _, given, _ in recorded.given} == {threads}


# --- the folder -----------------------------------------------------------------------------------------------------


def made(tmp_path: Path, home: Path, n: int = 3) -> Sweep:
    config = configs.to_dict(tiny(home, tmp_path))
    tasks = [{"run": f"run-{i}", "points": [], "config": config, "evaluations": []} for i in range(n)]
    return sweeps.create(tmp_path, "sweep", tasks, settings=["seed=0,1,2"], points=["a"])


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ("PENDING", "PENDING"), ("RUNNING", "RUNNING"), ("COMPLETING", "RUNNING"), ("CANCELLED", "CANCELLED"),
        ("FAILED", "FAILED"), ("TIMEOUT", "FAILED"), ("OUT_OF_MEMORY", "FAILED"), ("NODE_FAIL", "FAILED"),
        ("COMPLETED", "LOST"), (None, "LOST"),
    ],
)  # fmt: skip
def test_a_job_without_a_result_stands_as_the_cluster_says(
    tmp_path: Path, home: Path, told: str | None, state: str
) -> None:  # fmt: skip
    sweep = made(tmp_path, home)
    sweep.add_job(1, "7_1")
    sweeps.launched(sweep, {"name": "slurm"})
    sweep.logs.mkdir()
    (sweep.logs / "7_1_0.err").write_text("first\nslurmstepd: killed\n", encoding="utf-8")
    one = sweep.standings({} if told is None else {"7_1": told})[1]
    assert one.state == state
    if state == "FAILED":
        assert one.note == f"the cluster says {told}: first | slurmstepd: killed"


def test_a_job_that_slurm_queued_again_is_not_cancelled_any_more(tmp_path: Path, home: Path) -> None:
    """Preempted at once, it said that it was stopped; then the cluster put it back, and it began anew."""
    sweep = made(tmp_path, home)
    sweep.add_job(0, "7_0")
    sweep.say(0, {"cancelled": "saved at step 3"})
    assert [sweep.standings({"7_0": told})[0].state for told in ("COMPLETING", "CANCELLED", "PENDING", "RUNNING")] == [
        "CANCELLED", "CANCELLED", "PENDING", "RUNNING",
    ]  # fmt: skip
    sweep.begun(0, "7_0")
    assert sweep.answer(0) is None
    assert sweep.jobs() == {0: "7_0"}


def test_a_sweep_of_another_machine_is_cancelled_there(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Where folders are shared, the process of a lock may be one of another machine: here it is somebody else."""
    sweep = made(tmp_path, home)
    monkeypatch.setattr(control.os, "kill", lambda *_: pytest.fail("a stranger was told to stop"))
    with sweep.locked():
        assert sweep.holder() == (os.getpid(), socket.gethostname())
        monkeypatch.setattr(control.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(ValueError, match="cancel it there"):
            sweeps.stop(sweep)
    assert sweep.holder() is None


def test_an_answer_wins_over_the_cluster(tmp_path: Path, home: Path) -> None:
    sweep = made(tmp_path, home)
    sweep.add_job(0, "7_0")
    sweep.say(0, {"error": "ValueError: no"})
    assert sweep.standings({"7_0": "COMPLETED"})[0][2:] == ("FAILED", None, 8, "ValueError: no")
    sweep.say(0, {"train": {}, "evaluations": []})
    assert sweep.standings({"7_0": "RUNNING"})[0].state == "LOST"  # its run is not there
    sweep.run(0).path.mkdir()
    sweep.run(0).update_manifest(status="done")
    assert sweep.standings({"7_0": "RUNNING"})[0].state == "DONE"
    sweep.forget(0)
    assert sweep.standings({})[0].note == "not launched"


@pytest.mark.parametrize("run", ["../x", "/etc", "a/b", 3, None])
def test_an_altered_sweep_cannot_lead_out_of_the_folder_of_runs(tmp_path: Path, home: Path, run: Any) -> None:
    sweep = made(tmp_path, home)
    file = sweep.path / "manifest.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["tasks"][1]["run"] = run
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match="altered"):
        Sweep(sweep.path)


def test_sweeps_are_found_by_the_beginning_of_their_names(tmp_path: Path, home: Path) -> None:
    with pytest.raises(RunError, match="there is no sweep in"):
        sweeps.find_sweep(None, tmp_path)
    one, other = made(tmp_path, home, 2), made(tmp_path, home, 3)
    assert sweeps.find_sweep(None, tmp_path).name == other.name
    assert sweeps.find_sweep(one.name[:9], tmp_path).name == one.name
    assert sweeps.find_sweep(str(one.path), tmp_path).name == one.name
    with pytest.raises(RunError, match="no sweep ''"):
        sweeps.find_sweep("", tmp_path)
    with pytest.raises(RunError, match="names 2 sweeps"):
        sweeps.find_sweep("sweep", tmp_path)
    with pytest.raises(RunError, match="did you mean"):
        sweeps.find_sweep(one.name.replace("sweep-", "swep-"), tmp_path)
    (one.path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="truncated or altered"):
        sweeps.find_sweep(one.name, tmp_path)


def test_a_worker_left_alone_saves_and_ends(home: Path, tmp_path: Path) -> None:
    """Its stdin closes, as when the process that started it was killed."""
    task = {
        "config": configs.to_dict(tiny(home, tmp_path, "train.steps=100000", "train.checkpoint_every=100000")),
        "evaluations": [], "threads": 1,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "ropelab.sweeps.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    waited_for(lambda: any(run.metrics() for run in runs.all_runs(tmp_path)))
    process.stdin.close()
    process.stdin = None
    out, _ = process.communicate()
    assert "saved at step" in json.loads(out.splitlines()[-1])["cancelled"]
    (run,) = runs.all_runs(tmp_path)
    assert run.latest_checkpoint() is not None
    assert process.returncode == 0


# --- Slurm, as far as it goes without one ---------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of Slurm that play it: arrays of two tasks, a user's limit of `limit` arrays; the scripts they got."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "limit").write_text("1\n")
    (folder / "got").touch()
    programs = {
        "sbatch": 'n=$(grep -c "^#!" "$D/got"); '
        'if [ "$n" -ge "$(cat "$D/limit")" ]; then echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1; fi; '
        'cat "$1" >> "$D/got"; echo "Submitted batch job $((n + 7))"',
        "squeue": 'for i in $(seq "$(grep -c "^#!" "$D/got")"); do k=$((i + 6)); '
        'echo "${k}_0|PENDING"; echo "${k}_1|PENDING"; echo "$k|PENDING"; done',
        "scontrol": 'echo "MaxArraySize = 3"',
        "scancel": 'echo "$@" >> "$D/cancelled"',
        "srun": "exit 1",
        "sacct": "exit 1",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\nD={folder}\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.delenv("ROPELAB_SLURM", raising=False)
    return folder


ON_SLURM = ("--launcher", "slurm")


def test_a_submission_that_stops_half_way_says_so(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path
) -> None:
    """Three runs in arrays of two, and the limit is met at the second array: one run was never submitted."""
    where = f"runs_dir={tmp_path / 'runs'}"
    status, out, err = ropelab("sweep", "seed=0,1,2", *ON_SLURM, *here)
    assert (status, out) == (1, "")
    (sweep,) = [Sweep(path) for path in sweeps.all_sweeps(tmp_path / "runs")]
    assert err.count("AssocMaxSubmitJobLimit") == 1
    assert "AssocMaxSubmitJobLimit; 2 of 3 runs were submitted; when there is room, " in err
    assert f"ropelab retry {sweep.name} submits the other 1" in err
    assert [(one.state, one.note[:12]) for one in sweeps.standings(sweep)] == [
        ("PENDING", ""), ("PENDING", ""), ("PENDING", "not launched"),
    ]  # fmt: skip
    (slurm / "squeue").write_text("#!/bin/bash\n")  # the two are over and forgotten: waiting for the third is no use
    status, _, err = ropelab("collect", sweep.name, where, "--wait")
    assert status == 1
    assert "3 of 3 runs are not done; ropelab retry" in err
    assert "PENDING: " in err
    (slurm / "squeue").write_text('#!/bin/bash\necho "7_0|RUNNING"; echo "7_1|PENDING"; echo "8|PENDING"\n')
    (slurm / "limit").write_text("2\n")
    status, _, err = ropelab("retry", sweep.name, where)
    assert status == 0, err
    assert "1 of 3 runs submitted" in err
    assert Sweep(sweep.path).jobs() == {0: "7_0", 1: "7_1", 2: "8"}


EVIL = {
    "partition": "gpu\ntouch OWNED #", "account": "a'b", "qos": "\x1b[31mq", "constraint": "x y",
    "setup": ["touch OWNED"], "sbatch": ["wrap=touch OWNED"],
}  # fmt: skip


@pytest.mark.parametrize("key", EVIL)
def test_text_for_the_shell_is_never_taken_from_a_folder(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path, key: str
) -> None:
    sweep, where = launched(ropelab, here, tmp_path, {key: EVIL[key], "time_min": 77})
    before = {path: path.stat().st_mtime_ns for path in sweep.path.rglob("*")}
    status, out, err = ropelab("retry", sweep.name, where)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert f"launcher.{key}=" in err
    assert "never taken from a folder" in err
    assert f"ropelab retry {sweep.name} " in err
    assert "\x1b" not in err
    assert (slurm / "got").read_text() == ""
    assert {path: path.stat().st_mtime_ns for path in sweep.path.rglob("*")} == before
    none = "[]" if isinstance(EVIL[key], list) else "null"
    status, _, err = ropelab("retry", sweep.name, where, f"launcher.{key}={none}")
    assert status == 0, err
    script = (slurm / "got").read_text()
    assert "OWNED" not in script
    assert "#SBATCH --time=77" in script  # a number is kept


def launched(ropelab: Run, here: tuple[str, ...], tmp_path: Path, stored: dict[str, Any]) -> tuple[Sweep, str]:
    """A sweep that was launched on Slurm with settings that its folder says."""
    assert ropelab("sweep", "seed=0,1", *ON_SLURM, *here, "--emit-sbatch")[0] == 0
    (sweep,) = [Sweep(path) for path in sweeps.all_sweeps(tmp_path / "runs")]
    sweeps.launched(sweep, {"name": "slurm", **stored})
    return sweep, f"runs_dir={tmp_path / 'runs'}"


def test_text_for_the_shell_may_come_from_a_file_of_the_users_own(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("partition: mine\nsetup: ['module load a,b']\ntime_min: 5\n", encoding="utf-8")
    monkeypatch.setenv("ROPELAB_SLURM", str(own))
    sweep, where = launched(ropelab, here, tmp_path, {"partition": "theirs", "setup": ["theirs"], "time_min": 77})
    status, _, err = ropelab("retry", sweep.name, where)
    assert status == 0, err
    script = (slurm / "got").read_text()
    assert "#SBATCH --partition=mine\n" in script
    assert "\nmodule load a,b\n" in script
    assert "theirs" not in script
    assert "#SBATCH --time=77" in script
    for text, said in (("partitions: x\n", "did you mean partition?"), ("- a\n", "no file of lines"),
                       ("cpus: many\n", "launcher.cpus must be int"), ("a: b: c\n", "cannot be read")):  # fmt: skip
        own.write_text(text, encoding="utf-8")
        status, _, err = ropelab("retry", sweep.name, where)
        assert status == 2
        assert said in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "stored", [{"time_min": "7"}, {"time_min": [7]}, {"mem_gb": True}, {"cpus": 10**30}, {"mem_gb": 1e300}, {"x": 1}]
)
def test_an_altered_number_of_a_folder_is_refused(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path, stored: dict[str, Any]
) -> None:
    sweep, where = launched(ropelab, here, tmp_path, stored)
    status, _, err = ropelab("retry", sweep.name, where)
    assert status == 2
    assert f"launcher.{next(iter(stored))}" in err
    assert (slurm / "got").read_text() == ""


@pytest.mark.parametrize("override", ["launcher.partition=a\nb", "launcher.sbatch=[x=\x1b]", "launcher.qos=\u2028"])
def test_a_line_of_a_batch_script_is_one_line(override: str) -> None:
    with pytest.raises(ValueError, match="printable text in one line"):
        configs.launcher("slurm", [override])


def test_the_name_of_a_sweep_is_plain_in_a_batch_script(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path
) -> None:
    file = tmp_path / "my; $(touch OWNED) 'sweep'.yaml"
    file.write_text("seed: 0,1\n", encoding="utf-8")
    status, out, err = ropelab("sweep", str(file), *ON_SLURM, *here, "--emit-sbatch")
    assert status == 0, err
    assert "#SBATCH --job-name=ropelab-my____touch_OWNED___sweep_-" in out
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    for folder in ("a\nb", "a%j", "a\\b"):
        status, out, err = ropelab("sweep", "seed=0,1", *ON_SLURM, *changed(here, f"runs_dir={tmp_path / folder}"))
        assert (status, out) == (2, "")
        assert "choose another runs_dir" in err
        assert not (tmp_path / folder / "sweeps").exists()


def test_nothing_of_a_folder_is_read_in_a_job(ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path) -> None:
    """What submitit reads in the job lies in a folder that did not exist before it was submitted."""
    sweep, where = launched(ropelab, here, tmp_path, {})
    (sweep.path / "spool").mkdir()
    (sweep.path / "spool" / "7_0_submitted.pkl").write_bytes(b"a stranger's")
    assert ropelab("retry", sweep.name, where)[0] == 0
    (spool,) = [path for path in (sweep.path / "spool").iterdir() if path.is_dir()]
    assert f"submitit.core._submit {spool}\n" in (slurm / "got").read_text()
    shutil.rmtree(sweep.path / "spool")
    sweep.forget(0)
    sweep.forget(1)
    (sweep.path / "spool").symlink_to(tmp_path)
    (slurm / "limit").write_text("2\n")
    status, _, err = ropelab("retry", sweep.name, where)
    assert status == 2
    assert "is a link" in err


@pytest.mark.parametrize("job", ["--user=root", "-u", "7 8", "7_0\n", "$(x)", "", "[0-9]", "*"])
def test_only_jobs_reach_the_programs_of_slurm(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path, job: str
) -> None:
    sweep, where = launched(ropelab, here, tmp_path, {})
    sweep.add_job(0, job)
    assert sweeps.standings(sweep)[0].state == "PENDING"  # as without a job
    with pytest.raises(ValueError, match="was altered"):
        slurm_launcher.cancel(sweep, [job])
    ropelab("cancel", sweep.name, where)
    assert not (slurm / "cancelled").exists()


def test_a_failed_run_that_is_in_the_queue_again_goes_on(tmp_path: Path, home: Path) -> None:
    sweep = made(tmp_path, home)
    sweep.add_job(0, "7_0")
    sweep.say(0, {"error": "could not be queued again: Job is pending execution"})
    told = ("PENDING", "REQUEUED", "RUNNING", "COMPLETING", "FAILED")
    assert [sweep.standings({"7_0": one})[0].state for one in told] == [
        "PENDING", "PENDING", "RUNNING", "FAILED", "FAILED",
    ]  # fmt: skip


@pytest.mark.parametrize(("states", "asked"), [(["PENDING"], 1), (["RUNNING", "COMPLETING"], 2), (["RUNNING"] * 5, 5)])
def test_a_job_that_is_queued_already_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, states: list[str], asked: int
) -> None:
    """Slurm refuses to queue again what is pending: then it is where it should be. Else it is asked a few times."""
    requeues: list[str] = []

    def ask(program: str, *rest: str) -> str:
        if program == "scontrol":
            requeues.append(rest[-1])
            raise SchedulerError("scontrol: Job is pending execution for job 7_3")
        return f"7|FAILED\n7_2|FAILED\n7_3|{states[len(requeues) - 1]}\n"

    monkeypatch.setattr(slurm_launcher, "_ask", ask)
    monkeypatch.setattr(slurm_launcher.time, "sleep", lambda _: None)
    if states[-1] == "RUNNING":
        with pytest.raises(SchedulerError, match="pending execution"):
            slurm_launcher._queue_again("7_3")
    else:
        slurm_launcher._queue_again("7_3")
    assert requeues == ["7_3"] * asked


def test_a_task_is_at_work_for_as_long_as_its_worker_lives(tmp_path: Path, home: Path) -> None:
    """Also between the training and its evaluation, when nothing of the run is being written."""
    sweep = made(tmp_path, home)
    sweeps.launched(sweep, {"name": "local"})
    sweep.run(1).path.mkdir()
    sweep.run(1).update_manifest(status="done")
    program = "import sys, pathlib, ropelab.sweeps.worker as w; w._lock(pathlib.Path(sys.argv[1])); input(print(1))"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(sweep.work_path(1))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    assert [one.state for one in sweep.standings()] == ["LOST", "RUNNING", "LOST"]
    holder.kill()
    holder.communicate()
    assert [one.state for one in sweep.standings()] == ["LOST"] * 3


def test_what_a_run_says_does_not_steer_the_terminal(
    ropelab: Run, here: tuple[str, ...], slurm: Path, tmp_path: Path
) -> None:
    sweep, where = launched(ropelab, here, tmp_path, {})
    sweep.say(0, {"error": "first\nDONE everything\r\x1b[2J\x1b]0;x\x07 \u202egnp"})
    for command in ("status", "collect"):
        _, out, err = ropelab(command, sweep.name, where)
        assert "first DONE everything" in out + err
        assert not set(out + err) & set("\x1b\x07\r\u202e")
        assert not any(line.startswith("DONE") for line in (out + err).splitlines())
