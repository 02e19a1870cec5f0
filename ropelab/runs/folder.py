"""One trained model and its folder: identity, manifest, metrics, checkpoints, results. torch comes in with tensors.

    runs/<pos>[-<scaling>]-<data>-s<seed>-<digest8>/
        manifest.json      resolved configuration, digests, versions, device, status: running | done | failed
        metrics.jsonl      one line a logged step, append-only
        tokenizer.json     the run's own copy
        checkpoints/       step-00001000/{model,optimizer}.safetensors, state.json with their sha256: the newest two,
                           of a finished run the last; keep-0.2500/model.safetensors where train.keep asked for it
        results/           evaluations: <digest>.json and its per-token losses <digest>.safetensors
        searches/          of LongRoPE's factors, a folder each

Files are written under a temporary name, synced and renamed. Nothing here is a pickle: a stranger's run folder cannot
execute code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropelab import __version__, files
from ropelab.errors import OutsideError, RunBusyError, RunError
from ropelab.progress import tell
from ropelab.runs.identity import NUMERICS_VERSION

if TYPE_CHECKING:
    from torch import Tensor

# what a manifest says, by type: whoever wrote it, what is read from it is of these
TYPES: dict[str, files.Types] = {
    "run": (str,), "digest": (str,), "identity": (dict,), "config": (dict,), "status": (str,), "dtype": (str,),
    "train_ctx": (int,), "original_ctx": (int,), "first_step": (int,), "params": (int,), "step": (int,),
    "parent": (dict, type(None)), "corpus": (dict,), "tokenizer": (dict,), "error": (str, type(None)),
    "train_loss": (float, int), "val_nll": (float, int), "best_val_nll": (float, int), "environment": (dict,),
    "device": (str, type(None)), "matmul_precision": (str,),
}  # fmt: skip
NEEDED = ("run", "digest", "identity", "config", "train_ctx", "original_ctx", "corpus")
OF_RUNS = ("tokenizer", "dtype")  # what a checkpoint of others, which was only evaluated, does not say
INSIDE: dict[str, dict[str, type]] = {"corpus": {"name": str}}
INSIDE_OF_RUNS: dict[str, dict[str, type]] = {
    "corpus": {"digest": str, "name": str}, "tokenizer": {"digest": str, "n_vocab": int}
}  # fmt: skip


STATE: dict[str, files.Types] = {  # what state.json may say beside step and checksums
    "metrics": (dict,), "digest": (str,), "best_val_nll": (float, int, type(None)), "dtype": (str,),
    "matmul_precision": (str,), "threads": (int,), "summary": (dict,),
}  # fmt: skip
HEADER = 2**27  # bytes of a safetensors header; the library takes 100 MB
LINE = 2**16  # bytes of a line of metrics; ours have some hundred


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    def _own(self, name: str) -> Path:
        """A file or folder of the run. `RunError` where it is a link: it may lead out of a stranger's run."""
        try:
            return files.own(self.path / name, self.path)
        except OutsideError as error:
            raise RunError(str(error)) from None

    @property
    def manifest_path(self) -> Path:
        return self._own("manifest.json")

    @property
    def metrics_path(self) -> Path:
        return self._own("metrics.jsonl")

    @property
    def tokenizer_path(self) -> Path:
        return self._own("tokenizer.json")

    @property
    def results(self) -> Path:
        return self._own("results")

    @property
    def searches(self) -> Path:
        return self._own("searches")

    @property
    def checkpoints(self) -> Path:
        return self._own("checkpoints")

    def make(self) -> None:
        """Make the folder, should it not be there. `RunError` where a link stands in its place.

        A run that is evaluated may be reached through a link; one that is trained is written to where it was asked for.
        """
        if self.path.is_symlink():
            raise RunError(
                f"{self.path} is a link, and nothing is trained through one: move what it leads to into its place "
                "(mv), or give runs_dir=FOLDER"
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def manifest(self) -> dict[str, Any]:
        """`RunError` when it is absent, damaged, or not what a manifest holds."""
        fix = f"restore it, or train with the run's settings again: {self.name} is made from its checkpoints"
        path = self.manifest_path
        try:
            data = files.load_json(path)
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a run: it has no manifest.json") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}; {fix}") from None
        if (wrong := files.mistyped(data, {}, TYPES)) is not None:
            raise RunError(f"{path} is no manifest: {wrong}; {fix}")
        return dict(data)

    def finished_manifest(self) -> dict[str, Any]:
        """The manifest of a run whose weights can be used. `RunError` for an unfinished one; as `whole_manifest`."""
        manifest = self.manifest()
        if "checkpoint" in manifest:
            raise RunError(f"{self.name} is a checkpoint; evaluate it with --hf {manifest.get('source', 'FOLDER')}")
        if manifest.get("status") != "done":
            raise RunError(f"{self.name} is {self.status()}, not done; finish it with `ropelab train` first")
        return self.checked(manifest)

    def whole_manifest(self) -> dict[str, Any]:
        """The manifest, with all that a manifest says from the first step on.

        `RunError` where it lacks some of it, or where its numbers are those of another NUMERICS_VERSION.
        """
        return self.checked(self.manifest())

    def checked(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """A manifest of this run that was read already, as `whole_manifest`."""
        ours = "checkpoint" not in manifest
        lacking = [key for key in (*NEEDED, *(OF_RUNS if ours else ())) if key not in manifest]
        for key, inner in (INSIDE_OF_RUNS if ours else INSIDE).items():
            values = manifest.get(key, {})
            lacking += [f"{key}.{name}" for name, kind in inner.items() if not isinstance(values.get(name), kind)]
        if lacking:
            raise RunError(f"{self.manifest_path} is no manifest of a run: it lacks {', '.join(lacking)}")
        if not (1 <= manifest["original_ctx"] <= 2**40 and 1 <= manifest["train_ctx"] <= 2**40):
            raise RunError(f"{self.manifest_path} is no manifest of a run: train_ctx or original_ctx is no length")
        numerics = manifest["identity"].get("numerics")
        if ours and numerics != NUMERICS_VERSION:
            raise RunError(
                f"the numbers of {self.name} are not those of this ropelab (numerics {numerics}, here "
                f"{NUMERICS_VERSION}): it is of {made_by(manifest)}, or train the run again"
            )
        return manifest

    def update_manifest(self, **fields: Any) -> None:
        """Set fields. A manifest that says `done` is younger than those of all runs beside it, whatever the clock."""
        current = self.manifest() if self.manifest_path.exists() else {}
        files.write_sealed(self.manifest_path, {**current, **fields})
        if fields.get("status") == "done":
            others = [RunDir(path).written() for path in self.path.parent.iterdir() if path != self.path]
            if (latest := max(others, default=0)) >= self.written():
                os.utime(self.manifest_path, ns=(latest + 1000, latest + 1000))

    def written(self) -> int:
        """When the manifest was written, in nanoseconds; 0 where there is none any more."""
        try:
            return (self.path / "manifest.json").lstat().st_mtime_ns
        except OSError:
            return 0

    def status(self) -> str:
        """done | failed | running | interrupted: `running` with a free lock is a process that died."""
        status = str(self.manifest().get("status", "unknown"))
        return "interrupted" if status == "running" and not files.is_locked(self.path / "lock") else status

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one writer; a dead process does not keep it. `RunError` when another one holds it."""
        with self._flock(fcntl.LOCK_EX, f"{self.name} is being written by another process; wait for it or stop it"):
            yield

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep writers out while the run is read and evaluated; others may do so too. `RunError` where one writes.

        A run that cannot be written has no writers: then it is used without a lock.
        """
        try:
            os.close(files.open_lock(self.path))
        except OSError:
            yield
            return
        with self._flock(fcntl.LOCK_SH, f"{self.name} is being written by another process; wait for it or stop it"):
            yield

    @contextlib.contextmanager
    def _flock(self, kind: int, refused: str) -> Iterator[None]:
        pauses = iter((0.05, 0.1, 0.2, None))  # `status` of another process holds it for a moment
        while True:
            try:
                handle = files.open_lock(self.path)
            except FileNotFoundError:
                raise RunError(f"{self.name} was removed by another process") from None
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                # a run may have been removed, and another begun in its place, between opening and locking
                current = (self.path / "lock").lstat()
                if os.path.samestat(os.fstat(handle), current):
                    break
            except BlockingIOError:
                pause = next(pauses)
                if pause is None:
                    os.close(handle)
                    raise RunBusyError(refused) from None
                time.sleep(pause)
            except FileNotFoundError:
                os.close(handle)
                raise RunError(f"{self.name} was removed by another process") from None
            os.close(handle)
        try:
            yield
        finally:
            os.close(handle)

    # metrics

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line. `OSError` names the file when the disk is full."""
        files.append(self.metrics_path, json.dumps(line, allow_nan=False) + "\n", within=self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line."""
        path = self.metrics_path
        if not path.is_file():
            return []
        lines = []
        with path.open("rb") as file:
            while text := file.readline(LINE):
                with contextlib.suppress(ValueError):  # a line cut short by a kill, or none of ours
                    line = files.parse_json(text)
                    if files.mistyped(line, {"step": (int,)}) is None:
                        lines.append(line)
        return lines

    def _metrics_state(self) -> dict[str, Any]:
        """Size and sha256 of the metrics, synced: what a checkpoint says of the lines up to its step."""
        if not self.metrics_path.is_file():
            return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        files.sync(self.metrics_path)  # a checkpoint on the disk never has fewer metrics beside it than steps
        with self.metrics_path.open("rb") as file:
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def _metrics_hold(self, state: Mapping[str, Any]) -> bool:
        """Are the lines up to a checkpoint's step those that were written? Of an early version's it is not known."""
        known = state.get("metrics")
        if known is None:
            return True
        try:
            digest, left = hashlib.sha256(), known["bytes"]
            with self.metrics_path.open("rb") as file:
                while left > 0 and (part := file.read(min(left, 2**20))):
                    digest.update(part)
                    left -= len(part)
            return bool(digest.hexdigest() == known["sha256"])
        except (OSError, KeyError, TypeError, ValueError):
            return bool(known == {"bytes": 0, "sha256": hashlib.sha256().hexdigest()})

    def rewind(self, step: int) -> None:
        """Drop the metrics and checkpoints after `step`, which a resumed run writes again, and what kills left over.

        The checkpoints after the one that is gone on from are damaged: they must not count as earlier ones later.
        Metrics up to `step` that are not those that were written are set aside, and said: no number of them is used.
        """
        checkpoint = self.path / "checkpoints" / _step_name(step)
        state = _state(checkpoint) if step else None
        if state is not None and not self._metrics_hold(state):
            aside = self._own(f"metrics.damaged-{step}.jsonl")
            with contextlib.suppress(FileNotFoundError):
                self.metrics_path.replace(aside)
            tell(
                f"{self.metrics_path} is truncated, altered or missing; its lines up to step {step} are lost"
                f"{f' (what there is: {aside.name})' if aside.exists() else ''}, the weights are not"
            )
        if state is not None and "metrics" in state and self._metrics_hold(state):
            if self.metrics_path.exists():
                files.truncate(self.metrics_path, state["metrics"]["bytes"], within=self.path)
        else:
            kept = [line for line in self.metrics() if line["step"] <= step]
            files.write(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        for later in self._step_checkpoints():
            if later.name > _step_name(step):
                files.remove(later, within=self.path)
        # whoever writes here holds the run, so that what is left over is of killed processes, wherever they ran
        for folder in (self.path, self.checkpoints):
            files.clear_abandoned(folder, any_machine=True)

    # checkpoints

    def save_step(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, last: bool
    ) -> None:
        """Write the checkpoint of a step, from which training can go on: `checkpoints/step-<step>/`.

        It is read back, and only when its checksums hold are earlier ones removed: all at the `last` step, before
        that all but the one before. `OSError` when it cannot be written or read back; the earlier ones are there.
        """
        final = self.checkpoints / _step_name(step)
        self._save(final, tensors, {"step": step, **state, "metrics": self._metrics_state()})
        if not self._intact(final):
            raise OSError(errno.EIO, "the checkpoint reads back altered", str(final))
        self.drop_earlier(step, but=0 if last else 1)

    def drop_earlier(self, step: int, *, but: int = 0) -> None:
        """Remove the step checkpoints before that of `step`, which is whole, `but` for so many of the newest of them.

        Again when a run has ended, and is found to have: a kill may have come between the last one and this.
        """
        earlier = [old for old in self._step_checkpoints() if old.name < _step_name(step)]
        for old in earlier[: len(earlier) - but]:
            files.remove(old, within=self.path)

    def tidy(self) -> None:
        """Remove from a finished run the checkpoints before its last, where it can be written and nobody uses it."""
        last = self._last_checkpoint(self.manifest())
        if self._step_checkpoints()[0].name < last.name:
            with contextlib.suppress(OSError, RunBusyError), self.locked():
                self.drop_earlier(int(last.name.removeprefix("step-")))

    def save_kept(self, fraction: float, step: int, model: Mapping[str, Tensor]) -> None:
        """Write the weights at a fraction of the training, which stay: `checkpoints/keep-<fraction>/`."""
        self._save(self.checkpoints / f"keep-{fraction:.4f}", {"model": model}, {"step": step})

    def _save(self, final: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write a folder with one safetensors file per entry of `tensors`, and state.json with their sha256."""
        with files.new_folder(final) as temporary:
            sums = {}
            for part, content in tensors.items():
                file = temporary / f"{part}.safetensors"
                save_tensors({key: tensor.detach().cpu() for key, tensor in content.items()}, file)
                sums[file.name] = files.sha256_of(file)
            files.write_sealed(temporary / "state.json", {**state, "sha256": sums})
            files.remove(final, within=self.path)
            files.publish(temporary, final)

    def _step_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))

    @staticmethod
    def _intact(checkpoint: Path, only: str | None = None) -> bool:
        """Are the files of a checkpoint, or the one that is named, those that it recorded?"""
        state = _state(checkpoint)
        if state is None:
            return False
        try:
            return all(
                _is_whole(checkpoint / name) and files.sha256_of(checkpoint / name) == digest
                for name, digest in state["sha256"].items()
                if only in (None, name)
            )
        except OSError:
            return False

    def latest_checkpoint(self, fits: Callable[[Path], bool] = lambda checkpoint: True) -> Path | None:
        """The newest step checkpoint whose checksums hold and that `fits`; others are named on stderr and passed over.

        One beside which the metrics are damaged comes after an earlier one of which they are not.
        """
        damaged: list[str] = []
        found = without_metrics = None
        for checkpoint in reversed(self._step_checkpoints()):
            if not (self._intact(checkpoint) and fits(checkpoint)):
                damaged.append(checkpoint.name)
            elif self._metrics_hold(_state(checkpoint) or {}):
                found = checkpoint
                break
            elif without_metrics is None:
                without_metrics = checkpoint
        if without_metrics is not None:
            if found is None:  # the weights are worth more than the record of them
                found = without_metrics
            else:
                tell(
                    f"{self.metrics_path} is truncated or altered; training goes on from {found.name}, up to "
                    "which it is whole"
                )
        if damaged:
            instead = f"goes on from {found.name}" if found else "starts again at step 0: there is no earlier one"
            tell(f"{self.name}: {', '.join(damaged)} is truncated or altered; training {instead}")
        return found

    def is_done(self) -> bool:
        """Is the run finished, and does it have the weights it ended with? Missing ones are named on stderr."""
        if not self.manifest_path.exists():
            return False
        try:
            manifest = self.manifest()
        except RunError:  # `begun` says it
            return False
        if manifest.get("status") != "done":
            return False
        if self._intact(self._last_checkpoint(manifest)):
            return True
        tell(f"{self.name} is finished, but its weights are damaged or gone: training it")
        return False

    def begun(self) -> dict[str, Any]:
        """The manifest of a run that is to be trained; {} where there is none.

        A damaged one is said on stderr and removed: the training writes it again, from its checkpoints.
        """
        if not self.manifest_path.exists():
            return {}
        try:
            return self.manifest()
        except RunError as error:
            reason = str(error).partition("; ")[0]
            tell(f"{reason}; it is made again")
            files.remove(self.manifest_path, within=self.path)
            return {}

    def _last_checkpoint(self, manifest: Mapping[str, Any]) -> Path:
        try:
            return self.checkpoints / _step_name(int(manifest["config"]["train"]["steps"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RunError(f"{self.manifest_path} is no manifest: its config has no train.steps") from None

    def weights_digest(self, manifest: Mapping[str, Any] | None = None) -> str | None:
        """sha256 of the finished run's weights as its checkpoint recorded it; None where there is no such record.

        Nothing is hashed here: `load_weights` compares the file with it. `manifest`: the run's, where it was read.
        """
        try:
            state = _state(self._last_checkpoint(manifest or self.manifest()))
        except RunError:
            return None
        return None if state is None else str(state["sha256"]["model.safetensors"])

    def has_weights(self, manifest: Mapping[str, Any] | None = None) -> bool:
        """Are the finished run's weights those that its checkpoint recorded? They are read through for it."""
        return self._intact(self._last_checkpoint(manifest or self.manifest()), only="model.safetensors")

    def load_weights(self, manifest: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The finished run's weights. `RunError` when the run is unfinished or its weights are damaged."""
        checkpoint = self._last_checkpoint(manifest or self.finished_manifest())
        if not self._intact(checkpoint, only="model.safetensors"):
            raise RunError(f"{checkpoint} is truncated, altered or missing; train the run again")
        return load_tensors(checkpoint / "model.safetensors")


def made_by(manifest: Mapping[str, Any]) -> str:
    """The ropelab that made a run, and what to do with a run of it that this one cannot use."""
    made = manifest.get("environment", {}).get("ropelab")
    if made is None:
        return "an unknown version of ropelab: use the one that made it"
    if made == __version__:  # changed since, or another's manifest
        return f"another ropelab {made} than this one, or altered: use the code that made it"
    return f"ropelab {made}: use that version"


def checkpoint_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says beside the checksums: step, digest of the run, best_val_nll. The checkpoint is intact."""
    state = _state(checkpoint)
    assert state is not None
    return state


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """state.json of a step checkpoint; None where it is damaged, or names other files than a checkpoint's."""
    try:
        state = files.load_json(checkpoint / "state.json")
        if files.mistyped(state, {"sha256": (dict,), "step": (int,)}, STATE) is not None:
            return None
        sums = state["sha256"]
        if checkpoint.name != _step_name(state["step"]) or "model.safetensors" not in sums:
            return None
        if files.mistyped(sums, {}, dict.fromkeys(sums, (str,))) is not None:
            return None
        if not set(sums) <= {"model.safetensors", "optimizer.safetensors"}:
            return None
        # a link or a pipe is no checkpoint: a stranger's run must not have other files read
        plain = all(stat.S_ISREG((checkpoint / name).lstat().st_mode) for name in sums)
        metrics = state.get("metrics", {"bytes": 0})
        return dict(state) if plain and files.is_of(metrics.get("bytes"), (int,)) and metrics["bytes"] >= 0 else None
    except (OSError, ValueError):
        return None


def _is_whole(path: Path) -> bool:
    """Has a safetensors file the size that its header says? Known before it is read through, however large it is."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER:
            return False
        try:
            header = files.parse_json(file.read(length))
            ends = [item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"]
            return bool(path.stat().st_size == 8 + length + max(ends, default=0))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors into a file, which is on the disk then. `OSError` names it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from None
    files.sync(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. `RunError` where it is no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is no safetensors file ({error}); restore it, or make it again") from None
