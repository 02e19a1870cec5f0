"""One trained model and its folder: identity, manifest, metrics, checkpoints, results. torch comes in with tensors.

    runs/<pos>[-<scaling>]-<data>-s<seed>-<digest8>/
        manifest.json      resolved configuration, digests, versions, device, status: running | done | failed
        metrics.jsonl      one line a logged step, append-only
        tokenizer.json     the run's own copy
        checkpoints/       step-00001000/{model,optimizer}.safetensors, state.json with their sha256: the newest two,
                           of a finished run the last; keep-0.2500/model.safetensors where train.keep asked for it
        results/           evaluations: <digest>.json and its per-token losses <digest>.safetensors

Files are written under a temporary name, synced and renamed. Nothing here is a pickle: a stranger's run folder cannot
execute code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropelab import files
from ropelab.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

NUMERICS_VERSION = 1  # raised when a change of the code changes the numbers of an unchanged configuration


class RunError(ValueError):
    """A run that cannot be used: missing, unfinished, locked, or altered."""


# --- identity -------------------------------------------------------------------------------------------------------


def identity(
    config: Config, *, corpus_digest: str, tokenizer_digest: str, parent_digest: str | None = None
) -> dict[str, Any]:
    """What changes the numbers of a run, and nothing else: no paths, device, micro-batch, evaluation or tracking."""
    model, train = config.model, config.train
    known = {
        "numerics": NUMERICS_VERSION,
        "pos": {"name": config.pos.name, **config.pos.parameters},
        "scaling": {"name": config.scaling.name, **config.scaling.parameters},
        "model": {"n_layer": model.n_layer, "d_model": model.d_model, "n_head": model.n_head, "qk_norm": model.qk_norm},
        "corpus": corpus_digest,
        "tokenizer": tokenizer_digest,
        "train": {
            "ctx": train.ctx,
            "batch_size": train.batch_size,
            "steps": train.steps,
            "lr": train.lr,
            "final_lr": train.final_lr,
            "warmup_steps": train.warmup,
            "weight_decay": train.weight_decay,
            "grad_clip": train.grad_clip,
            "dtype": train.dtype,
        },
        "seed": config.seed,
    }
    # said only where it differs from what the first versions knew, so that their runs are found again
    if config.positions.name != "contiguous":
        known["positions"] = {"name": config.positions.name, **config.positions.parameters}
    if parent_digest is not None:
        known["parent"] = parent_digest
    return known


def recipe(manifest: Mapping[str, Any]) -> str:
    """A digest of all that changes a run's numbers but its seed; of a parent its recipe, not its own seed."""
    known = {key: value for key, value in manifest["identity"].items() if key != "seed"}
    parent = manifest.get("parent")
    if parent is not None:
        known["parent"] = parent.get("recipe", parent["digest"])
    return files.digest_of(known)[:16]


def run_name(config: Config, digest: str) -> str:
    """`rope-books-s0-1a2b3c4d`, `rope-yarn-pose-books-s0-1a2b3c4d`."""
    words = [config.pos.name]
    words += [config.scaling.name] if config.scaling.name != "none" else []
    words += [config.positions.name] if config.positions.name != "contiguous" else []
    return "-".join([*words, config.data.name, f"s{config.seed}", digest[:8]])


# --- the folder -----------------------------------------------------------------------------------------------------


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def results(self) -> Path:
        return self.path / "results"

    def manifest(self) -> dict[str, Any]:
        """`RunError` when it is absent or no JSON object."""
        try:
            data = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a run: it has no manifest.json") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.manifest_path} cannot be read: {error}") from None
        if not isinstance(data, dict):
            raise RunError(f"{self.manifest_path} is not a JSON object")
        return data

    def update_manifest(self, **fields: Any) -> None:
        current = self.manifest() if self.manifest_path.exists() else {}
        files.write_json(self.manifest_path, {**current, **fields})

    def status(self) -> str:
        """done | failed | running | interrupted: `running` with a free lock is a process that died."""
        status = str(self.manifest().get("status", "unknown"))
        return "interrupted" if status == "running" and not self._locked() else status

    def _locked(self) -> bool:
        try:
            with (self.path / "lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one writer; a dead process does not keep it. `RunError` when another one holds it."""
        with (self.path / "lock").open("a+") as file:
            for pause in (0.05, 0.1, 0.2, None):  # `status` of another process holds it for a moment
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if pause is None:
                        raise RunError(
                            f"{self.name} is being written by another process; wait for it or stop it"
                        ) from None
                    time.sleep(pause)
            yield

    # metrics

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line. `OSError` names the file when the disk is full."""
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics_path)) from None

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line."""
        if not self.metrics_path.exists():
            return []
        lines = []
        for text in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                lines.append(json.loads(text))
        return lines

    def rewind(self, step: int) -> None:
        """Drop the metrics and checkpoints after `step`, which a resumed run writes again, and what kills left over.

        The checkpoints after the one that is gone on from are damaged: they must not count as earlier ones later.
        """
        kept = [line for line in self.metrics() if line["step"] <= step]
        files.write(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        for checkpoint in self._step_checkpoints():
            if checkpoint.name > _step_name(step):
                files.discard(checkpoint)
        for leftover in (self.path / "checkpoints").glob(".*"):  # temporary folders of killed processes
            shutil.rmtree(leftover)
        for leftover in self.path.glob(".*.json*.*"):
            leftover.unlink()

    # checkpoints

    def save_step(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, last: bool
    ) -> None:
        """Write the checkpoint of a step, from which training can go on: `checkpoints/step-<step>/`.

        It is read back, and only when its checksums hold are earlier ones removed: all at the `last` step, before
        that all but the one before. `OSError` when it cannot be written or read back; the earlier ones are there.
        """
        if self.metrics_path.exists():  # a checkpoint on the disk never has fewer metrics beside it than steps
            with self.metrics_path.open("rb") as file:
                os.fsync(file.fileno())
        final = self.path / "checkpoints" / _step_name(step)
        self._save(final, tensors, {"step": step, **state})
        if not self._intact(final):
            raise OSError(errno.EIO, "the checkpoint reads back altered", str(final))
        earlier = [old for old in self._step_checkpoints() if old.name < final.name]
        for old in earlier if last else earlier[:-1]:
            files.discard(old)

    def save_kept(self, fraction: float, step: int, model: Mapping[str, Tensor]) -> None:
        """Write the weights at a fraction of the training, which stay: `checkpoints/keep-<fraction>/`."""
        self._save(self.path / "checkpoints" / f"keep-{fraction:.4f}", {"model": model}, {"step": step})

    def _save(self, final: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write a folder with one safetensors file per entry of `tensors`, and state.json with their sha256."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with files.new_folder(final) as temporary:
            sums = {}
            for part, content in tensors.items():
                file = temporary / f"{part}.safetensors"
                try:
                    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}, file)
                except SafetensorError as error:  # how safetensors reports a full disk
                    raise OSError(f"{final} cannot be written: {error}") from None
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                sums[file.name] = files.sha256_of(file)
            files.write_json(temporary / "state.json", {**state, "sha256": sums})
            if final.exists():
                files.discard(final)
            files.publish(temporary, final)

    def _step_checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))

    @staticmethod
    def _intact(checkpoint: Path) -> bool:
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            return all(files.sha256_of(checkpoint / name) == digest for name, digest in state["sha256"].items())
        except (OSError, ValueError, KeyError, AttributeError):
            return False

    def latest_checkpoint(self) -> Path | None:
        """The newest step checkpoint whose checksums hold; damaged ones are named on stderr and passed over."""
        damaged: list[str] = []
        found = None
        for checkpoint in reversed(self._step_checkpoints()):
            if self._intact(checkpoint):
                found = checkpoint
                break
            damaged.append(checkpoint.name)
        if damaged:
            instead = f"goes on from {found.name}" if found else "starts again at step 0: there is no earlier one"
            print(
                f"ropelab: {self.name}: {', '.join(damaged)} is truncated or altered; training {instead}",
                file=sys.stderr,
            )
        return found

    def is_done(self) -> bool:
        """Is the run finished, and does it have the weights it ended with? Missing ones are named on stderr."""
        if not self.manifest_path.exists():
            return False
        manifest = self.manifest()
        if manifest.get("status") != "done":
            return False
        if self._intact(self._last_checkpoint(manifest)):
            return True
        print(f"ropelab: {self.name} is finished, but its weights are damaged or gone: training it", file=sys.stderr)
        return False

    def _last_checkpoint(self, manifest: Mapping[str, Any]) -> Path:
        return self.path / "checkpoints" / _step_name(manifest["config"]["train"]["steps"])

    def load_weights(self) -> dict[str, Tensor]:
        """The finished run's weights. `RunError` when the run is unfinished or its checkpoint is damaged."""
        manifest = self.manifest()
        if manifest.get("status") != "done":
            raise RunError(f"{self.name} is {self.status()}, not done; finish it with `ropelab train` first")
        checkpoint = self._last_checkpoint(manifest)
        if not self._intact(checkpoint):
            raise RunError(f"{checkpoint} is truncated, altered or missing; train the run again")
        return load_tensors(checkpoint / "model.safetensors")


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# --- the folder of runs ---------------------------------------------------------------------------------------------


def open_runs_dir(path: str) -> Path:
    """Create the folder of runs. `ValueError` when it cannot be written."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"runs_dir={path} cannot be written ({error.strerror}); choose another with runs_dir=FOLDER"
        ) from None
    return folder


def all_runs(runs_dir: Path) -> list[RunDir]:
    """Every run folder, oldest first."""
    if not runs_dir.is_dir():
        return []
    found = [RunDir(path) for path in runs_dir.iterdir() if (path / "manifest.json").is_file()]
    return sorted(found, key=lambda run: run.manifest_path.stat().st_mtime_ns)


def find_run(name: str, runs_dir: Path) -> RunDir:
    """The run that a path, a folder name, or an unambiguous beginning of one names. `RunError` otherwise."""
    for candidate in (Path(name).expanduser(), runs_dir / name):
        if (candidate / "manifest.json").is_file():
            return RunDir(candidate)
    known = all_runs(runs_dir)
    # `sinusoidal` is sinusoidal-stdlib-s0-..., not sinusoidal_qk-...
    matches = [run for run in known if run.name.startswith(f"{name}-") or run.name.rpartition("-")[2] == name]
    matches = matches or [run for run in known if run.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        more = f" and {len(matches) - 8} more" if len(matches) > 8 else ""
        listed = ", ".join(run.name for run in matches[:8])
        raise RunError(f"'{name}' names {len(matches)} runs: {listed}{more}; give more of the name of one")
    import difflib

    close = difflib.get_close_matches(name, [run.name for run in known], n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"`ropelab runs` lists those in {runs_dir}"
    raise RunError(f"there is no run '{name}'; {hint}")


def latest_finished(runs_dir: Path) -> RunDir:
    """`RunError` when there is none."""
    for run in reversed(all_runs(runs_dir)):
        with contextlib.suppress(RunError):
            if run.manifest().get("status") == "done":
                return run
    raise RunError(f"there is no finished run in {runs_dir}; train one first: ropelab train --pos rope")
