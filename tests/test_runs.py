"""Runs: identity, and that nothing is lost: stops, kills, damaged checkpoints, full disks, diverged losses."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ropelab import config as configs
from ropelab import data, errors, files, runs, training
from ropelab.cli import app, main
from ropelab.config import Method
from ropelab.errors import NonFiniteLossError, RunError
from ropelab.runs import RunDir
from ropelab.training.plan import steps_to_keep
from tests.lab import Process, finished, load, settings, tiny, train, waited_for, write_corpus


def at_step(when: int, do: Callable[[], object]) -> Callable[..., None]:
    """A progress callback that does something once, after a step of the training."""
    pending = [do]

    def progress(description: str, done: int, total: int, **facts: Any) -> None:
        if description == "train" and done >= when and pending:
            pending.pop()()

    return progress


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def interrupted(home: Path, runs_dir: Path, *overrides: str, at: int, signum: int = signal.SIGTERM) -> RunDir:
    """Train until a real signal comes after step `at`."""
    with pytest.raises(errors.Interrupted) as caught:
        training.train(tiny(home, runs_dir, *overrides), progress=at_step(at, lambda: send(signum)))
    assert caught.value.signum == signum
    (run,) = runs.all_runs(runs_dir)
    assert f"{run.name} saved at step {at};" in str(caught.value)
    return run


def steps_saved(run: RunDir) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def content(run: RunDir) -> dict[str, bytes]:
    """Every tensor of every checkpoint of a run, by name, as its bytes."""
    found = {}
    for file in sorted((run.path / "checkpoints").rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            where = f"{file.parent.name}/{file.name}/{name}/{tensor.dtype}/{tuple(tensor.shape)}"
            found[where] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def lines_without_speed(run: RunDir) -> list[dict[str, Any]]:
    raw = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in raw]


def assert_same_training(run: RunDir, straight: RunDir) -> None:
    assert run.name == straight.name
    steps = straight.manifest()["config"]["train"]["steps"]
    assert [line["step"] for line in lines_without_speed(run)] == list(range(1, steps + 1))
    assert lines_without_speed(run) == lines_without_speed(straight)
    ours, theirs = content(run), content(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert run.status() == straight.status() == "done"
    same = ("train_loss", "val_nll", "best_val_nll", "val_bits_per_byte", "step", "digest", "dtype")
    assert {key: run.manifest()[key] for key in same} == {key: straight.manifest()[key] for key in same}
    assert json.loads((run.path / "checkpoints" / steps_saved(run)[-1] / "state.json").read_text())["step"] == steps


# --- identity -------------------------------------------------------------------------------------------------------

CORPUS, TOKENIZER = "c" * 64, "d" * 64
GOLDEN = "b661cb5d48896bc62c31103f436c3f596a803e1a4d95977248b809e10c063c0b"
CHANGING = (
    "pos=alibi", "pos.base=500", "pos.layout=interleaved", "pos.fraction=0.5", "scaling=linear", "scaling=yarn",
    "model.n_layer=3", "model.d_model=64", "model.n_head=8", "model.qk_norm=true",
    "train.ctx=64", "train.batch_size=32", "train.steps=900", "train.lr=1e-3", "train.final_lr=0",
    "train.warmup_steps=7", "train.weight_decay=0", "train.grad_clip=null", "train.dtype=bf16", "seed=1",
    "positions=pose", "positions=randomized",
)  # fmt: skip
KEEPING = (
    "train.micro_batch_size=4", "train.compile=true", "train.activation_checkpointing=true", "train.parallel=fsdp",
    "train.deterministic=true",
    "eval.memory_gb=4", "train.eval_every=7", "train.checkpoint_every=7",
    "train.keep=[0.5]", "eval.ctx=64", "eval.protocol=last", "eval.stride=8", "eval.last=8", "eval.tokens=99",
    "eval.max_ctx=4096", "eval.window=64", "eval.scalings=[none]", "eval.dtype=bf16", "eval.split=validation",
    "eval.baseline=unigram", "eval.bos=auto",
    "track.wandb=offline", "track.project=other", "device=cpu", "runs_dir=elsewhere", "cache_dir=elsewhere",
    "train.warmup_steps=50",  # as the default comes to
)  # fmt: skip
BY_CONTENT = {  # of `data`
    "name", "path", "subset", "tokenizer", "vocab_size", "tokenizer_path", "text_field", "splits", "test_path",
    "held_out", "split_by", "endings", "overlap", "repeated_heads",
}  # fmt: skip


def digest(*overrides: str, corpus: str = CORPUS, tokenizer: str = TOKENIZER, parent: str | None = None) -> str:
    config = load(*overrides)
    if config.scaling.name != "none":
        config = dataclasses.replace(config, scaling=Method(config.scaling.name, {"factor": 4.0}))
    identity = runs.identity_of(config, corpus_digest=corpus, tokenizer_digest=tokenizer, parent_digest=parent)
    return files.digest_of(identity)


@pytest.mark.parametrize("override", CHANGING)
def test_what_changes_the_numbers_changes_the_digest(override: str) -> None:
    assert digest(override) != digest()


@pytest.mark.parametrize("override", KEEPING)
def test_what_leaves_the_numbers_alone_leaves_the_digest_alone(override: str) -> None:
    assert digest(override) == digest()


def test_every_key_has_been_decided_upon() -> None:
    """A new key of the configuration must be entered in one of the tables above."""
    tree = configs.to_dict(load())
    keys = {f"{head}.{key}" for head, inner in tree.items() if isinstance(inner, dict) for key in inner}
    keys |= {head for head, inner in tree.items() if not isinstance(inner, dict)}
    decided = {item.partition("=")[0] for item in (*CHANGING, *KEEPING)} | {f"data.{key}" for key in BY_CONTENT}
    named_by_group = {"pos.name", "scaling.name", "model.name", "positions.name"}
    by_its_own_digest = {"parent"}
    assert keys - decided - named_by_group - by_its_own_digest == set()


def test_a_parent_counts_by_its_digest_not_by_its_name() -> None:
    assert digest("parent=somewhere") == digest()
    assert len({digest(), digest(parent="e" * 64), digest(parent="f" * 64)}) == 3


@pytest.mark.parametrize("group", ["pos", "scaling"])
def test_every_method_and_every_parameter_of_one_is_in_the_digest(group: str) -> None:
    digests = []
    for name in configs.choices(group):
        method: Method = getattr(load(f"{group}={name}"), group)
        for variant in (method, *(Method(name, {**method.parameters, key: "other"}) for key in method.parameters)):
            pos, scaling = (variant, load().scaling) if group == "pos" else (load().pos, variant)
            config = dataclasses.replace(load(), pos=pos, scaling=scaling)
            digests.append(files.digest_of(runs.identity_of(config, corpus_digest=CORPUS, tokenizer_digest=TOKENIZER)))
    assert len(digests) > len(configs.choices(group))
    assert len(set(digests)) == len(digests)


def test_the_text_and_the_tokeniser_are_in_the_digest() -> None:
    assert len({digest(), digest(corpus="e" * 64), digest(tokenizer="e" * 64)}) == 3


def test_the_digest_of_the_default_configuration_is_golden() -> None:
    assert digest() == GOLDEN, (
        "the identity of the default run changed. If its numbers change, raise NUMERICS_VERSION; if they do not, "
        "finished runs of users would be trained again: keep the identity as it was"
    )


def test_equal_text_in_another_folder_is_the_same_run(home: Path, tmp_path: Path) -> None:
    here = tiny(home, tmp_path)
    write_corpus(tmp_path / "moved")
    write_corpus(tmp_path / "changed")
    with (tmp_path / "changed" / "3.txt").open("a", encoding="utf-8") as file:
        file.write("one line more\n")

    def corpus_digest(path: Path) -> str:
        config = dataclasses.replace(here.data, path=str(path))
        return data.prepare(config, cache_dir=home / "cache").digest

    assert corpus_digest(tmp_path / "moved") == corpus_digest(home / "corpus")
    assert corpus_digest(tmp_path / "changed") != corpus_digest(home / "corpus")


def test_names_say_what_the_run_is() -> None:
    name = runs.run_name(load("pos=rope", "scaling=yarn", "seed=3"), "1a2b3c4d5e6f")
    assert name == "rope-yarn-stdlib-s3-1a2b3c4d"
    assert runs.run_name(load("pos=alibi"), "1a2b3c4d5e6f") == "alibi-stdlib-s0-1a2b3c4d"


# --- stop and go on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pos", "dtype"), [("learned", "fp32"), ("rope", "bf16")])
def test_stopping_and_going_on_changes_no_bit(home: Path, tmp_path: Path, pos: str, dtype: str) -> None:
    """Stopped by SIGTERM after step 3 and by SIGINT after step 6 of 8, with weights kept after steps 2 and 6.

    Every encoding is stopped and gone on with in tests/test_zoo.py.
    """
    overrides = (f"pos={pos}", f"train.dtype={dtype}", "train.keep=[0.25,0.75]")
    straight = train(home, tmp_path / "straight", *overrides)
    run = interrupted(home, tmp_path / "stopped", *overrides, at=3)
    assert run.status() == "interrupted"
    assert steps_saved(run) == ["keep-0.2500", "step-00000003"]
    run = interrupted(home, tmp_path / "stopped", *overrides, at=6, signum=signal.SIGINT)
    assert steps_saved(run) == ["keep-0.2500", "keep-0.7500", "step-00000003", "step-00000006"]
    assert_same_training(train(home, tmp_path / "stopped", *overrides), straight)
    assert steps_saved(run) == ["keep-0.2500", "keep-0.7500", "step-00000008"]


def test_a_scheduler_that_sends_several_signals_gets_one_checkpoint(home: Path, tmp_path: Path) -> None:
    """TERM, then USR2, as with a preemption: the second does not kill what the first has told to save."""

    def both() -> None:
        send(signal.SIGTERM)
        send(signal.SIGUSR2)

    with pytest.raises(errors.Interrupted, match="saved at step 3") as stopped:
        training.train(tiny(home, tmp_path), progress=at_step(3, both))
    assert stopped.value.signum == signal.SIGTERM
    (run,) = runs.all_runs(tmp_path)
    assert steps_saved(run) == ["step-00000003"]


def test_deterministic_kernels_are_asked_for_while_a_run_trains(home: Path, tmp_path: Path, straight: RunDir) -> None:
    """An operation without such a kernel is refused; on a CPU this model's numbers are the same with and without."""
    found: list[bool] = []
    config = tiny(home, tmp_path, "train.deterministic=true")
    training.train(config, progress=at_step(1, lambda: found.append(torch.are_deterministic_algorithms_enabled())))
    assert found == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    (run,) = runs.all_runs(tmp_path)
    assert_same_training(run, straight)


def test_a_stop_at_the_last_step_finishes_the_run(home: Path, tmp_path: Path) -> None:
    result = training.train(tiny(home, tmp_path), progress=at_step(8, lambda: send(signal.SIGTERM)))
    assert (result["status"], result["step"]) == ("done", 8)


def test_a_finished_run_is_not_trained_again(home: Path, tmp_path: Path) -> None:
    run = train(home, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    again = training.train(tiny(home, tmp_path), progress=at_step(1, pytest.fail))
    assert again["skipped"]
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_run_goes_on_in_the_dtype_it_began_in(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` on a machine with bf16, stopped, and gone on with on a machine without."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    run = interrupted(home, tmp_path, "train.dtype=auto", at=2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert train(home, tmp_path, "train.dtype=auto").manifest()["dtype"] == "bf16"
    assert run.manifest()["identity"]["train"]["dtype"] == "auto"


def test_settings_outside_the_identity_may_change_between_stops(home: Path, tmp_path: Path) -> None:
    straight = train(home, tmp_path / "straight")
    interrupted(home, tmp_path / "stopped", "train.checkpoint_every=2", at=5)
    run = train(home, tmp_path / "stopped", "train.checkpoint_every=3")
    assert_same_training(run, straight)


def test_the_best_validation_loss_is_remembered(home: Path, tmp_path: Path) -> None:
    run = interrupted(home, tmp_path, at=5)
    state = run.path / "checkpoints" / "step-00000005" / "state.json"
    stored = json.loads(state.read_text(encoding="utf-8"))
    assert stored["best_val_nll"] == run.metrics()[4]["val_nll"]
    files.write_sealed(state, files.unsealed(stored) | {"best_val_nll": 0.25})  # as if there had been a better one
    assert train(home, tmp_path).manifest()["best_val_nll"] == 0.25


def test_a_run_folder_holds_no_pickle(home: Path, tmp_path: Path) -> None:
    run = train(home, tmp_path, "train.keep=[0.5]")
    kinds = {path.suffix for path in run.path.rglob("*") if path.is_file() and path.name != "lock"}
    assert kinds == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize(("fraction", "steps"), [(0.01, 8), (0.0625, 8)])
def test_a_fraction_before_the_first_step_cannot_be_kept(
    home: Path, tmp_path: Path, fraction: float, steps: int
) -> None:
    with pytest.raises(ValueError, match=rf"train\.keep={fraction:g} .*use at least 0\.125"):
        train(home, tmp_path, f"train.keep=[{fraction}]", f"train.steps={steps}")
    assert runs.all_runs(tmp_path) == []
    assert steps_to_keep(tiny(home, tmp_path, "train.keep=[0.125,0.5]").train) == {1: 0.125, 4: 0.5}


# --- damaged checkpoints --------------------------------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    altered = bytearray(file.read_bytes())
    altered[-5] ^= 4
    file.write_bytes(altered)


def lose_the_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


def garble_the_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("[1, 2", encoding="utf-8")


@pytest.fixture(scope="module")
def straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The tiny run, trained without a stop."""
    return train(home, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_state, garble_the_state])
def test_a_damaged_checkpoint_is_passed_over(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: RunDir, damage: Callable[[Path], None]
) -> None:
    run = interrupted(home, tmp_path, "train.checkpoint_every=2", at=5)
    assert steps_saved(run) == ["step-00000004", "step-00000005"]
    damage(run.path / "checkpoints" / "step-00000005")
    capsys.readouterr()
    run = interrupted(home, tmp_path, "train.checkpoint_every=1000", at=6)
    assert "step-00000005 is truncated or altered; training goes on from step-00000004" in capsys.readouterr().err
    assert steps_saved(run) == ["step-00000004", "step-00000006"]  # the damaged one does not count as an earlier one
    assert_same_training(train(home, tmp_path), straight)


def test_without_an_intact_checkpoint_training_starts_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: RunDir
) -> None:
    run = interrupted(home, tmp_path, "train.checkpoint_every=2", at=5)
    truncate(run.path / "checkpoints" / "step-00000004")
    flip_a_bit(run.path / "checkpoints" / "step-00000005")
    capsys.readouterr()
    assert_same_training(train(home, tmp_path), straight)
    said = capsys.readouterr().err
    assert "step-00000005, step-00000004 is truncated or altered; training starts again at step 0" in said


def test_a_finished_run_with_damaged_weights_is_refused_and_trained_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: RunDir
) -> None:
    run = train(home, tmp_path)
    assert run.load_weights().keys() == straight.load_weights().keys()
    truncate(run.path / "checkpoints" / "step-00000008")
    with pytest.raises(RunError, match="train the run again"):
        run.load_weights()
    assert_same_training(train(home, tmp_path), straight)
    assert "its weights are damaged or gone" in capsys.readouterr().err


def test_what_a_kill_left_half_written_is_removed(
    home: Path, tmp_path: Path, straight: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted(home, tmp_path, at=4)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("ropelab.files._machine", lambda: "0123abcd")  # killed on another machine
        half = run.path / "checkpoints" / files._temporary_name()
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (run.path / files._temporary_name()).write_text("{", encoding="utf-8")
    (run.path / ".manifest.json.swp").write_text("an editor's", encoding="utf-8")
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}\n{"step": 6, "lo')
    assert_same_training(train(home, tmp_path), straight)
    assert [path.name for path in run.path.rglob(".*")] == [".manifest.json.swp"]


def test_earlier_checkpoints_stay_until_the_new_one_is_read_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: RunDir
) -> None:
    """A disk that garbles what is written: the training ends, and what was there before is still there."""
    run = interrupted(home, tmp_path, at=3)
    publish = files.publish

    def garbling(temporary: Path, final: Path) -> bool:
        published = publish(temporary, final)
        flip_a_bit(final)
        return published

    monkeypatch.setattr(files, "publish", garbling)
    with pytest.raises(OSError, match="reads back altered"):
        train(home, tmp_path, "train.checkpoint_every=5")
    assert steps_saved(run) == ["step-00000003", "step-00000005"]
    assert run.status() == "failed"
    monkeypatch.undo()
    assert_same_training(train(home, tmp_path), straight)


# --- diverged -------------------------------------------------------------------------------------------------------


def test_a_diverged_run_keeps_the_weights_before_the_bad_step(home: Path, tmp_path: Path) -> None:
    """At lr=1e30 the first update makes products of weights overflow: the second step's loss is not finite."""
    overrides = ("train.lr=1e30", "train.warmup_steps=0", "train.checkpoint_every=1000")
    with pytest.raises(NonFiniteLossError, match=r"at step 2; lower train\.lr"):
        train(home, tmp_path, *overrides)
    (run,) = runs.all_runs(tmp_path)
    manifest = run.manifest()
    assert (run.status(), manifest["failed_step"]) == ("failed", 2)
    assert "at step 2" in manifest["error"]
    assert steps_saved(run) == ["step-00000001"]
    assert run.latest_checkpoint() is not None
    for file in (run.path / "checkpoints").rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    assert [line["step"] for line in run.metrics()] == [1]
    with pytest.raises(RunError, match="is failed, not done"):
        run.load_weights()
    with pytest.raises(NonFiniteLossError, match="at step 2"):  # not taken for finished
        train(home, tmp_path, *overrides)


def test_a_run_that_failed_and_then_succeeds_forgets_the_failure(home: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        training.train(tiny(home, tmp_path, "train.checkpoint_every=2"), progress=at_step(5, fail))
    (run,) = runs.all_runs(tmp_path)
    assert (run.status(), run.manifest()["error"]) == ("failed", "RuntimeError: a cable was pulled")
    run.update_manifest(failed_step=5)
    manifest = train(home, tmp_path).manifest()
    assert (manifest["status"], manifest["error"], manifest["failed_step"]) == ("done", None, None)


# --- real processes -------------------------------------------------------------------------------------------------

LONG = ("train.steps=250", "train.checkpoint_every=10", "train.eval_every=125", "train.batch_size=4")


@pytest.fixture(scope="module")
def long_straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(home, tmp_path_factory.mktemp("long"), *LONG)


def start(home: Path, runs_dir: Path, *changes: str) -> Process:
    return Process(main, "train", *settings(home, runs_dir, *LONG, *changes))


def lines_written(runs_dir: Path) -> int:
    """The lines of the one metrics.jsonl that there is, or will be."""
    return sum(path.read_bytes().count(b"\n") for path in runs_dir.glob("*/metrics.jsonl"))


def test_signals_from_outside(home: Path, tmp_path: Path, long_straight: RunDir) -> None:
    """SIGTERM and SIGINT to `ropelab train`: saved, said, 143 and 130; a second process is refused meanwhile."""
    first = start(home, tmp_path)
    waited_for(lambda: lines_written(tmp_path) >= 5, first)
    (run,) = runs.all_runs(tmp_path)
    assert run.status() == "running"
    first.send_signal(signal.SIGSTOP)  # holds the run for as long as the second one takes
    second = finished(main, "train", *settings(home, tmp_path, *LONG))
    assert second.status == 2
    assert second.err == f"ropelab: {run.name} is being written by another process; wait for it or stop it\n"
    first.send_signal(signal.SIGCONT)
    for process, signum, status in ((first, signal.SIGTERM, 143), (None, signal.SIGINT, 130)):
        stopped = process or start(home, tmp_path)
        waited_for(lambda more=len(run.metrics()) + 5: lines_written(tmp_path) >= more, stopped)  # type: ignore[misc]
        stopped.send_signal(signum)
        output, errors = stopped.communicate()
        assert (stopped.returncode, output) == (status, ""), errors
        step = run.metrics()[-1]["step"]
        said = errors.splitlines()[-1]  # before it, what a verdict will lack
        assert said == f"ropelab: {run.name} saved at step {step}; the same command goes on from there"
        assert steps_saved(run)[-1] == f"step-{step:08}"
        assert run.status() == "interrupted"
    assert_same_training(train(home, tmp_path, *LONG), long_straight)


def test_kills_at_random_moments(home: Path, tmp_path: Path, long_straight: RunDir) -> None:
    draw = random.Random(2)
    for progress in (0, 60, 120):
        process = start(home, tmp_path)
        waited_for(lambda at=progress + draw.randint(2, 50): lines_written(tmp_path) >= at, process)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.01))
        process.kill()
        process.communicate()
        (run,) = runs.all_runs(tmp_path)
        assert run.status() == "interrupted"
    assert_same_training(train(home, tmp_path, *LONG), long_straight)


SIXTY = ("train.steps=60", "train.eval_every=60", "train.batch_size=4")


@pytest.fixture(scope="module")
def sixty_straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train(home, tmp_path_factory.mktemp("sixty"), *SIXTY)


@pytest.mark.parametrize(
    ("limit", "status", "what"),
    [
        (10_000, "failed", "step-00000005"),  # the weights do not fit
        (5_000, "failed", "metrics.jsonl"),  # metrics.jsonl does not
        (None, "interrupted", "metrics.jsonl"),  # nor does the manifest, once it holds the error
        (1_500, "interrupted", "File too large"),  # nor does it at all
    ],
)
def test_a_full_disk_ends_the_training_with_a_line_and_loses_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sixty_straight: RunDir, limit: int | None,
    status: str, what: str,
) -> None:  # fmt: skip
    every = 1000 if limit in (5_000, None) else 5
    overrides = (*SIXTY, f"train.checkpoint_every={every}")
    run = interrupted(home, tmp_path / "full", *overrides, at=4)
    limit = limit or run.manifest_path.stat().st_size + 20
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit) as ended:
            app(["train", *settings(home, tmp_path / "full", *overrides)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1
    assert said.startswith("ropelab: ")
    assert what in said
    assert run.status() == status
    assert steps_saved(run) == ["step-00000004"]
    assert [path.name for path in run.path.rglob(".*")] == []
    assert_same_training(train(home, tmp_path / "full", *overrides), sixty_straight)


# --- the folder of runs ---------------------------------------------------------------------------------------------


def fake_run(runs_dir: Path, name: str, **manifest: Any) -> RunDir:
    run = RunDir(runs_dir / name)
    run.update_manifest(**manifest)
    return run


def test_status_is_running_only_while_someone_holds_the_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "a", status="running")
    assert run.status() == "interrupted"
    with run.locked():
        assert run.status() == "running"
        with pytest.raises(RunError, match="another process"), RunDir(run.path).locked():
            pass
    assert run.status() == "interrupted"


def test_a_glance_at_the_status_does_not_keep_a_writer_out(tmp_path: Path) -> None:
    """`status` holds the lock for a moment: whoever wants to write then waits for that moment."""
    run = fake_run(tmp_path, "a", status="running")
    with run.locked():
        pass
    with (run.path / "lock").open("rb") as glance:
        fcntl.flock(glance, fcntl.LOCK_SH)
        release = threading.Timer(0.1, fcntl.flock, (glance, fcntl.LOCK_UN))
        release.start()
        with run.locked():
            assert run.status() == "running"
        release.join()


def test_runs_are_found_by_path_name_beginning_and_digest(tmp_path: Path) -> None:
    for name in ("rope-text-s0-aaaa1111", "rope-text-s1-bbbb2222", "alibi-text-s0-cccc3333"):
        fake_run(tmp_path, name, status="done")
    assert runs.find_run("alibi", tmp_path).name == "alibi-text-s0-cccc3333"
    assert runs.find_run("bbbb2222", tmp_path).name == "rope-text-s1-bbbb2222"
    assert runs.find_run(str(tmp_path / "rope-text-s0-aaaa1111"), Path("elsewhere")).name == "rope-text-s0-aaaa1111"
    with pytest.raises(RunError, match="'rope' names 2 runs"):
        runs.find_run("rope", tmp_path)
    with pytest.raises(RunError, match="did you mean alibi-text-s0-cccc3333"):
        runs.find_run("albi-text-s0-cccc3333", tmp_path)


def test_the_latest_finished_run_is_neither_running_nor_damaged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="train one first"):
        runs.latest_finished(tmp_path)
    known = {"config": {}, "train_ctx": 8, "original_ctx": 8, "dtype": "fp32",
             "identity": {"numerics": runs.NUMERICS_VERSION},
             "corpus": {"digest": "c", "name": "text"}, "tokenizer": {"digest": "t", "n_vocab": 257}}  # fmt: skip
    for age, (name, status) in enumerate([("a", "done"), ("b", "done"), ("c", "failed"), ("d", "running")]):
        run = fake_run(tmp_path, name, status=status, run=name, digest=name, **known)
        os.utime(run.manifest_path, (1000 + age, 1000 + age))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "manifest.json").write_text("[", encoding="utf-8")
    assert runs.latest_finished(tmp_path).name == "b"


def test_a_manifest_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match=r"is not a run: it has no manifest\.json"):
        run.manifest()
    run.manifest_path.write_text("[1]", encoding="utf-8")
    with pytest.raises(RunError, match="no JSON object"):
        run.manifest()
    run.manifest_path.write_bytes(b"\xff{")
    with pytest.raises(RunError, match="cannot be read"):
        run.manifest()


def test_a_runs_dir_that_is_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="choose another with runs_dir=FOLDER"):
        runs.check_runs_dir(str(tmp_path / "file"))
