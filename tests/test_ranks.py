"""One run over several processes: the numbers of one process, real signals and kills, failures on one rank alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ropelab import errors, evaluation, runs
from ropelab.cli.options import status_of
from ropelab.devices import device_of_rank
from ropelab.distributed import SINGLE, Ranks, detect_launch, parallel_of
from ropelab.distributed.group import Launch, first_host
from ropelab.runs import RunDir
from ropelab.training import Step, build_optimizer, steps
from ropelab.training.loop import validation_nll
from ropelab.training.plan import rank_micro
from tests.lab import PATIENCE, ROOT, settings, tiny, train, waited_for
from tests.ranks_script import CHANGES, ENCODINGS, LONG, OTHER_SEED, SCORED, SHARDED, scored
from tests.test_runs import assert_same_training, interrupted, lines_without_speed, lines_written, steps_saved
from tests.test_training import gpt, recipe, windows

KINDS = ("ddp", "fsdp")


def torchrun(*arguments: str) -> list[str]:
    options = ("--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    return [sys.executable, "-m", "torch.distributed.run", *options, *arguments]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], timeout: float = PATIENCE) -> tuple[int, str, str]:
    """Exit status, stdout and stderr. One that does not come to an end is stopped, and with it what it started."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun tells its processes, and kills them half a minute later
        output, errors = process.communicate(timeout=60)
        pytest.fail(f"not ended after {timeout} s: {output}{errors}")
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def out(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/ranks_script.py left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parent / "ranks_script.py"
    status, output, errors = ended(start(torchrun(str(script), str(folder), str(home))))
    assert (status, output) == (0, ""), errors
    return folder


@pytest.fixture(scope="module")
def said(out: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [json.loads((out / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


# --- the numbers ----------------------------------------------------------------------------------------------------


def one_process(pos: str) -> tuple[list[Step], float, dict[str, torch.Tensor]]:
    """Steps, validation loss and weights, the whole batch in one pass."""
    config = recipe(**{**CHANGES, "micro_batch_size": None, "activation_checkpointing": False})
    model = gpt(pos)
    batches = lambda step: windows(seed=step)  # noqa: E731
    done = list(steps(model, build_optimizer(model, config), batches, config, start=0, dtype=torch.float32))
    return done, validation_nll(model.eval(), windows(3), dtype=torch.float32, batch=3), model.state_dict()


@pytest.mark.parametrize("pos", ENCODINGS)
def test_steps_are_those_of_one_process(out: Path, said: list[dict[str, Any]], pos: str) -> None:
    """Also where one rank has 4 targets and the other 24, a norm is clipped, and parameters are numbers or uneven."""
    done, nll, weights = one_process(pos)
    assert all(step.grad_norm > CHANGES["grad_clip"] for step in done)
    for kind in KINDS if pos in SHARDED else ("ddp",):
        first, second = (rank["numbers"][f"{kind}-{pos}"] for rank in said)
        assert first["steps"] == second["steps"]
        assert first["val_nll"] == second["val_nll"] == pytest.approx(nll, rel=1e-6)
        for (loss, norm, synced), step in zip(first["steps"], done, strict=True):
            assert loss == pytest.approx(step.loss, rel=1e-6)
            assert norm == pytest.approx(step.grad_norm, rel=1e-5)
            assert synced
        found = load_file(out / f"{kind}-{pos}.safetensors")
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            # Adam divides by its second moment: where a gradient is rounding alone so is the step, of lr at most
            assert (found[name] - weight).abs().mean() < 5e-5, (kind, name)
    assert [rank["numbers"][f"ddp-{pos}"]["held"] for rank in said] == [1, 1]
    if pos in SHARDED:
        parts = [rank["numbers"][f"fsdp-{pos}"]["held"] for rank in said]
        assert 1 <= sum(parts) < 1.01  # numbers without a dimension are held by both
        assert max(parts) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_breaks_on_one_rank_breaks_the_step_of_all(
    out: Path, said: list[dict[str, Any]], kind: str
) -> None:
    for rank in said:
        first, second, error = rank["numbers"][f"{kind}-broken"]["seen"]
        assert (first, second) == (1, 2)
        # no loss where the separator is due: 0 x infinity
        assert error == "the loss became nan at step 3; lower train.lr or use train.dtype=fp32"
    config = recipe(steps=4)
    model = gpt()
    going = steps(model, build_optimizer(model, config), lambda step: windows(seed=step), config, start=0,
                  dtype=torch.float32)  # fmt: skip
    next(going), next(going)
    found = load_file(out / f"{kind}-broken.safetensors")
    for name, weight in model.state_dict().items():
        assert (found[name] - weight).abs().mean() < 5e-5, name


def the_run(runs_dir: Path) -> RunDir:
    (run,) = runs.all_runs(runs_dir)
    return run


def assert_close(run: RunDir, other: RunDir, rel: float = 1e-5) -> None:
    """Metrics within `rel` at every step."""
    lines, others = lines_without_speed(run), lines_without_speed(other)
    assert len(lines) == len(others) > 0
    for line, its in zip(lines, others, strict=True):
        assert line == pytest.approx(its, rel=rel)


def test_sixty_steps_of_a_run_are_those_of_one_process(out: Path, home: Path, tmp_path: Path) -> None:
    run = the_run(out / "long")
    alone = train(home, tmp_path, *LONG)
    assert run.name == alone.name
    assert_close(run, alone)
    ours, theirs = run.manifest(), alone.manifest()
    assert (ours["world_size"], ours["parallel"], theirs["world_size"], theirs["parallel"]) == (2, "ddp", 1, None)
    assert ours["identity"] == theirs["identity"]
    assert ours["val_nll"] == pytest.approx(theirs["val_nll"], rel=1e-6)
    mine = load_file(run.path / "checkpoints" / "step-00000060" / "optimizer.safetensors")
    assert mine.keys() == load_file(alone.path / "checkpoints" / "step-00000060" / "optimizer.safetensors").keys()


# --- runs -----------------------------------------------------------------------------------------------------------


def test_fsdp_trains_the_run_that_ddp_trains(out: Path, said: list[dict[str, Any]]) -> None:
    assert_close(the_run(out / "fsdp"), the_run(out / "straight"))
    assert the_run(out / "fsdp").manifest()["spread"] == [{"step": 0, "world_size": 2, "parallel": "fsdp"}]
    for rank in said:  # every rank returns what the first one wrote
        assert rank["runs"]["straight"] == said[0]["runs"]["straight"]
        assert [rank["runs"][name]["skipped"] for name in ("straight", "again")] == [False, True]


def test_a_signal_to_one_rank_stops_all_at_one_step_and_resuming_is_bit_exact(
    out: Path, said: list[dict[str, Any]]
) -> None:
    again = "the same command goes on from there"
    for rank in said:
        assert rank["runs"]["term"] == [signal.SIGTERM, f"at step 4; {again}"]
        assert rank["runs"]["usr2"] == [signal.SIGUSR2, f"at step 6; {again}"]
    run = the_run(out / "stopped")
    assert_same_training(run, the_run(out / "straight"))
    assert run.manifest()["spread"] == [{"step": 0, "world_size": 2, "parallel": "ddp"}]


def test_a_run_goes_on_with_other_ranks_and_says_so(
    out: Path, home: Path, said: list[dict[str, Any]], tmp_path: Path
) -> None:  # fmt: skip
    """Two replicas, then two shards, then one process."""
    assert all(rank["runs"][f"mixed {kind}"][0] == signal.SIGTERM for rank in said for kind in KINDS)
    before = the_run(out / "mixed")
    (step,) = {int(name[-8:]) for name in steps_saved(before)[-1:]}
    run = train(home, out / "mixed")
    assert run.path == before.path
    assert_close(run, the_run(out / "straight"))
    assert run.manifest()["spread"] == [
        {"step": 0, "world_size": 2, "parallel": "ddp"},
        {"step": 3, "world_size": 2, "parallel": "fsdp"},
        {"step": step, "world_size": 1, "parallel": None},
    ]


def test_evaluation_over_ranks_gives_the_numbers_of_one_process(
    out: Path, home: Path, said: list[dict[str, Any]], tmp_path: Path
) -> None:  # fmt: skip
    """Bit by bit: the passes are the same, on one rank or the other."""
    run = the_run(out / "straight")
    config = tiny(home, tmp_path, "eval.ctx='32,64'", "eval.tokens=4096")
    alone = evaluation.evaluate(run, config.eval, cache_dir=config.cache_dir, folder=tmp_path / "alone")
    (stored,) = run.results.glob("*.safetensors")
    ours, theirs = load_file(stored), load_file(alone.losses_path)
    assert ours.keys() == theirs.keys() >= {"nll.32", "nll.64"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for rank in said:
        assert rank["runs"]["evaluated"]["rows"] == json.loads(json.dumps(alone.result.to_json()["rows"]))


@pytest.mark.parametrize(("count", "rows"), SCORED)
def test_the_passes_of_an_evaluation_are_shared_out_whole(
    said: list[dict[str, Any]], count: int, rows: int
) -> None:  # fmt: skip
    """The losses tell how many windows were in their pass: they are as of one process, in its order."""
    alone = scored(None, count, rows)
    first, second = (rank["numbers"][f"{count} by {rows}"] for rank in said)
    assert first["passes"] + second["passes"] == alone["passes"] or count < rows
    if count >= rows:
        assert abs(len(first["passes"]) - len(second["passes"])) <= 1
        assert first["losses"] == second["losses"] == alone["losses"]
    assert len(first["losses"]) == len(second["losses"]) == 2 * count


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_on_one_rank_ends_all_and_is_told_by_it_alone(out: Path, said: list[dict[str, Any]]) -> None:
    first, second = said
    assert second["pulled"] == ["LookupError", "a cable was pulled", None]
    assert first["pulled"] == ["RemoteRankError", "rank 1 failed: a cable was pulled", 1]
    run = the_run(out / "pulled")
    assert (run.status(), run.manifest()["error"]) == ("failed", "RemoteRankError: rank 1 failed: a cable was pulled")


def test_ranks_with_different_commands_are_refused(out: Path, said: list[dict[str, Any]]) -> None:
    first, second = said
    assert OTHER_SEED
    line = "rank 1 has another run than rank 0: all need the same command, code and text"
    assert second["other"] == ["ValueError", line, None]
    assert first["other"] == ["RemoteRankError", f"rank 1 failed: {line}", 2]
    assert runs.all_runs(out / "other") == []


def test_a_batch_that_the_ranks_do_not_divide_is_refused_once(out: Path, said: list[dict[str, Any]]) -> None:
    line = "train.batch_size=5 cannot be shared by 2 ranks; use 4 or 6"
    kinds = {rank["batch"][0]: rank["batch"][1] for rank in said}
    assert kinds.keys() == {"ValueError", "RemoteRankError"}
    assert kinds["ValueError"] == line
    assert runs.all_runs(out / "batch") == []


# --- the command ----------------------------------------------------------------------------------------------------


def command(home: Path, runs_dir: Path, *overrides: str) -> list[str]:
    return torchrun("-m", "ropelab", "train", "--json", *settings(home, runs_dir, *overrides))


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text(encoding="ascii").split()]


@pytest.mark.skipif(not os.environ.get("ROPELAB_COMPILE_TESTS"), reason="minutes of compiling: ROPELAB_COMPILE_TESTS=1")
@pytest.mark.parametrize("pos", ["rope", "alibi", "t5"])
def test_sharded_compiled_and_recomputed_it_is_one_process(pos: str, home: Path, tmp_path: Path) -> None:
    """All three at once, as a large model has it."""
    changes = ("train.parallel=fsdp", "train.compile=true", "train.activation_checkpointing=true")
    given = (f"pos={pos}", "train.dtype=fp32")
    status, _, errors = ended(start(command(home, tmp_path / "two", *given, *changes)))
    assert status == 0, errors
    assert_close(the_run(tmp_path / "two"), train(home, tmp_path / "one", *given))


@pytest.mark.slow
def test_a_killed_training_is_resumed_bit_exactly(out: Path, home: Path, tmp_path: Path) -> None:
    """`torchrun -m ropelab train`, killed with SIGKILL in the middle, against one that was not."""
    process = start(command(home, tmp_path, *LONG))
    waited_for(lambda: lines_written(tmp_path) >= 25, process)
    for pid in (process.pid, *workers_of(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    run = the_run(tmp_path)
    assert run.manifest()["status"] == "running"
    assert 25 <= len(run.metrics()) < 60
    status, output, errors = ended(start(command(home, tmp_path, *LONG)))
    assert (status, [line for line in errors.splitlines() if line.startswith(("ropelab:", "Traceback"))]) == (0, [])
    result = json.loads(output)  # one object, of one rank
    assert (result["step"], result["skipped"]) == (60, False)
    assert_same_training(run, the_run(out / "long"))


@pytest.mark.slow
def test_a_mistake_is_said_once_and_ends_all_ranks_with_2(home: Path, tmp_path: Path) -> None:
    _, output, errors = ended(start(command(home, tmp_path, "train.steps=0")))
    assert output == ""
    ours = [line for line in errors.splitlines() if line.startswith("ropelab: ")]
    assert ours == ["ropelab: train.steps must be >= 1, not 0"]
    # torchrun's report of its two processes, of which it ends one that takes longer to end by itself than the other
    statuses = re.findall(r"exitcode  : (-?\d+)", errors)
    assert len(statuses) == 2
    assert "2" in statuses
    assert set(statuses) <= {"2", "-15"}
    assert list(tmp_path.iterdir()) == []


def test_usr2_stops_a_training_of_one_process_too(home: Path, tmp_path: Path) -> None:
    run = interrupted(home, tmp_path, at=3, signum=signal.SIGUSR2)
    assert steps_saved(run)[-1] == "step-00000003"
    assert status_of(errors.Interrupted(signal.SIGUSR2, run.name, 3)) == 140
    assert status_of(errors.Interrupted(signal.SIGINT, run.name, 3)) == 130


# --- how a process learns its place ---------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
STEP = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_NODELIST": "gpu[07-09,12],n1",
}  # fmt: skip


def test_torchrun_and_slurm_are_read() -> None:
    assert detect_launch(TORCHRUN) == Launch(3, 4, 1, 2, "gpu07", 29500, served=True)
    assert detect_launch(STEP) == Launch(4, 5, 0, 1, "gpu07", 10000 + 31 * 77 + 1, served=False)
    assert detect_launch({**STEP, "SLURM_NODEID": "1"}).local_world == 2  # type: ignore[union-attr]
    placed = detect_launch({**STEP, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000"})
    assert placed is not None
    assert placed[4:6] == ("127.0.0.1", 4000)
    one_node = detect_launch({**STEP, "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"})
    assert one_node is not None
    assert one_node[3:5] == (5, "127.0.0.1")
    assert detect_launch({**STEP, **TORCHRUN}) == detect_launch(TORCHRUN)  # torchrun within a Slurm step


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        {
            **STEP,
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1",
            "SLURM_NODEID": "0",
        },
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77"},  # a batch script, of which there is one
    ],
)
def test_a_process_that_is_the_only_one_stays_alone(environ: dict[str, str]) -> None:
    assert detect_launch(environ) is None


@pytest.mark.parametrize(
    "environ", [{**TORCHRUN, "RANK": "4"}, {**TORCHRUN, "RANK": "x"}, {"SLURM_STEP_NUM_TASKS": "2"}]
)
def test_an_environment_that_makes_no_sense_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="use torchrun or srun"):
        detect_launch(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[007-009,12],n1", "gpu007"), ("a,b", "a"), ("r[1-2]c[3,5-6]-x,z", "r1c3-x")],
)
def test_the_first_machine_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def ranks_of(world: int, *, local_rank: int = 0, local_world: int = 1) -> Ranks:
    """One of several ranks, without the others."""
    ranks = Ranks()
    ranks.world, ranks.local_rank, ranks.local_world = world, local_rank, local_world
    return ranks


@pytest.mark.parametrize(
    ("devices", "local_rank", "local_world", "slurm", "expected"),
    [
        (4, 2, 4, False, "cuda:2"),
        (1, 0, 1, False, "cuda:0"),  # one rank on each machine
        (1, 1, 2, True, "cuda:0"),  # Slurm shows each task its own device
        (1, 1, 2, False, None),
        (2, 2, 3, False, None),
    ],
)
def test_every_rank_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, devices: int, local_rank: int, local_world: int, slurm: bool, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_PROCID", "1")
    ranks = ranks_of(4, local_rank=local_rank, local_world=local_world)
    if expected is None:
        with pytest.raises(ValueError, match="start one for each, or use device=cpu"):
            device_of_rank("auto", ranks)
    else:
        assert device_of_rank("auto", ranks) == device_of_rank("cuda", ranks) == torch.device(expected)
    assert device_of_rank("cpu", ranks) == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda:0 is one device for 4 ranks"):
        device_of_rank("cuda:0", ranks)


@pytest.mark.parametrize(
    ("size", "micro", "world", "expected"),
    [
        (16, None, 1, 16), (16, None, 4, 4), (16, 16, 2, 8), (16, 4, 2, 4), (16, 8, 4, 4),
        (5, None, 2, "use 4 or 6"), (3, None, 4, "use 4"), (24, 8, 2, "a rank's share, 12 of train.batch_size=24"),
    ],
)  # fmt: skip
def test_the_ranks_share_the_batch(size: int, micro: int | None, world: int, expected: int | str) -> None:
    config = recipe(batch_size=size, micro_batch_size=micro)
    if isinstance(expected, int):
        assert rank_micro(config, world) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            rank_micro(config, world)


def test_models_that_fill_half_of_a_device_are_sharded_where_that_is_left_to_the_program() -> None:
    """16 bytes a parameter: 1000 parameters are 16 kB."""
    assert parallel_of("auto", 1000, 31_999) == "fsdp"
    assert parallel_of("auto", 1000, 32_000) == "ddp"
    assert parallel_of("auto", 10**12, None) == "ddp"
    assert [parallel_of(kind, 10**12, 1) for kind in ("ddp", "fsdp")] == ["ddp", "fsdp"]


def test_one_process_takes_part_in_nothing() -> None:
    assert (SINGLE.rank, SINGLE.world, SINGLE.is_first) == (0, 1, True)
    caught = [signal.SIGTERM]
    assert SINGLE.signals(caught) is caught
    tensor = torch.arange(3.0)
    assert SINGLE.all_reduce(tensor) is tensor
    assert SINGLE.shard(7) == slice(0, 7)
    SINGLE.connect(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_a_command_for_one_process_refuses_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ropelab.cli.options import app

    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    for rank, said in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            app(["runs"])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("4 processes of this command were started") == said
