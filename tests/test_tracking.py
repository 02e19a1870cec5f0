"""The echo to wandb: what an offline run holds, read with wandb's own protocol, and what a failing echo does."""

from __future__ import annotations

import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from ropelab import experiment, runs
from ropelab.runs import RunDir
from ropelab.schema import TrackConfig
from ropelab.tracking import Tracker
from tests.lab import tiny, train
from tests.test_runs import interrupted

OFFLINE = ("track.wandb=offline", "track.project=trial")


def read_records(file: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, crc, length, type) behind 7 bytes."""
    raw = file.read_bytes()
    assert raw[:4] == b":W&B"
    records, part, at = [], b"", 7
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", raw, at)
        content = raw[at + 7 : at + 7 + length]
        assert crc == zlib.crc32(raw[at + 6 : at + 7] + content)
        at += 7 + length
        part += content
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
            part = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append({"step": row["_step"], **{k: v for k, v in row.items() if not k.startswith("_")}})
    return rows


def offline_runs(run: RunDir) -> list[Path]:
    return sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)


@pytest.fixture
def no_caller(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb is pointed at a socket of ours, which nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield
        with pytest.raises(TimeoutError):
            server.accept()


def test_an_offline_run_holds_the_metrics_and_a_resumed_one_goes_on(
    home: Path,
    tmp_path: Path,
    no_caller: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = interrupted(home, tmp_path, *OFFLINE, at=3)
    train(home, tmp_path, *OFFLINE)
    assert run.status() == "done"
    assert capfd.readouterr() == ("", "")
    parts = [read_records(file) for file in offline_runs(run)]
    assert len(parts) == 2
    assert history(parts[0]) == run.metrics()[:3]
    assert history(parts[1]) == run.metrics()[3:]
    assert [line["step"] for line in run.metrics()] == list(range(1, 9))
    for records, exit_code in zip(parts, (1, 0), strict=True):
        (header,) = [record.run for record in records if record.HasField("run")]
        assert (header.run_id, header.project, header.display_name) == (
            run.manifest()["digest"][:16], "trial", run.name,
        )  # fmt: skip
        values = {item.key: json.loads(item.value_json) for item in header.config.update}
        assert values["train"]["lr"] == 3e-3
        assert values["pos"]["name"] == "rope"
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [exit_code]


def test_the_numbers_do_not_depend_on_the_echo(home: Path, tmp_path: Path) -> None:
    plain = train(home, tmp_path / "plain")
    echoed = train(home, tmp_path / "echoed", *OFFLINE)
    assert [line["loss"] for line in echoed.metrics()] == [line["loss"] for line in plain.metrics()]
    assert echoed.name == plain.name
    assert not (plain.path / "wandb").exists()


def test_a_failing_echo_does_not_end_the_training(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """wandb's service dies between two steps."""
    init = wandb.init

    def fragile(**keys: Any) -> Any:
        started = init(**keys)
        log = started.log

        def failing(values: dict[str, Any], step: int) -> None:
            if step == 4:
                raise BrokenPipeError("the service is gone")
            log(values, step=step)

        monkeypatch.setattr(started, "log", failing)
        return started

    monkeypatch.setattr(wandb, "init", fragile)
    run = train(home, tmp_path, *OFFLINE)
    assert (run.status(), len(run.metrics())) == ("done", 8)
    assert capsys.readouterr().err == (
        "ropelab: wandb failed (BrokenPipeError: the service is gone); metrics.jsonl has it all\n"
    )
    wandb.teardown()


def test_online_without_a_key_is_the_users_mistake(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"track\.wandb=online: .*use track\.wandb=offline"):
        experiment.train(tiny(home, tmp_path / "runs", "track.wandb=online"))
    (run,) = runs.all_runs(tmp_path / "runs")
    assert run.status() == "interrupted"


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(TrackConfig("disabled", "x"), name="a", run_id="b", folder=tmp_path, facts={})
    tracker.log({"step": 1, "loss": 2.0})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []
