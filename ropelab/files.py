"""Files that are whole or not there: written under a temporary name, synced, renamed. And digests of content.

A temporary file or folder is locked by the process that fills it. One that nobody holds was left by a killed process:
whoever writes under the same name next removes it.

A JSON object can be sealed: it then holds a digest of itself, so that a flipped bit is no other number.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class DamagedError(ValueError):
    """A file that is not what was written; the message says how, without the file's name."""


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in its one canonical form, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when there is none or it is damaged, its seal included."""
    try:
        return load_json(path)
    except (OSError, ValueError):
        return None


def load_json(path: Path) -> Any:
    """The value in a JSON file; of a sealed object what was sealed. `DamagedError`; `OSError` where none is there."""
    if path.exists() and not path.is_file():  # a pipe would be waited for without an end
        raise DamagedError("it is no file")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedError(f"it is truncated or altered: {error}") from None
    except RecursionError:
        raise DamagedError("it is nested too deeply") from None
    return unsealed(value)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself in it."""
    return {**value, "seal": {"sha256": digest_of(value)}}


def unsealed(value: Any) -> Any:
    """What was sealed; a value without a seal as it is. `DamagedError` where the seal does not fit."""
    if not isinstance(value, dict):
        return value
    # of a flipped bit in the name of the seal at least its shape is left
    named = [key for key, inner in value.items() if isinstance(inner, dict) and inner.keys() == {"sha256"}]
    if "seal" not in value and not named:
        return value
    rest = {key: inner for key, inner in value.items() if key != "seal"}
    try:
        fits = value.get("seal") == {"sha256": digest_of(rest)}
    except (RecursionError, ValueError):
        fits = False
    if not fits:
        raise DamagedError('it was altered since it was written (if on purpose, remove its "seal")')
    return rest


def write(path: Path, content: bytes) -> None:
    """Write a file; a reader sees the old one or the whole new one. `OSError` names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    _remove_abandoned(path.parent, prefix)
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
        temporary = Path(name)
        if _held(handle, temporary):
            break
        os.close(handle)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())  # mkstemp is private; this is an ordinary file
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole. `ValueError` for a number that is not finite: JSON has none."""
    write(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal, as a whole."""
    # as it will be read: tuples are lists there, and every key a string
    write_json(path, sealed(json.loads(json.dumps(value, allow_nan=False))))


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` to write files into, removed at the end if it was not published."""
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name[:16]}-"
    _remove_abandoned(final.parent, prefix)
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        handle = os.open(temporary, os.O_RDONLY)
        if _held(handle, temporary):
            break
        os.close(handle)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def publish(temporary: Path, final: Path) -> bool:
    """Rename a finished folder to its place; False when another process was first (its folder stays)."""
    temporary.chmod(0o777 & ~_umask())
    sync_folder(temporary)
    try:
        temporary.rename(final)
    except OSError:
        if not final.exists():
            raise
        return False
    sync_folder(final.parent)
    return True


def discard(folder: Path) -> None:
    """Remove a folder: renamed first, so that its name never stands for half of it."""
    with new_folder(folder) as temporary, contextlib.suppress(FileNotFoundError):
        folder.rename(temporary / "discarded")


def _held(handle: int, temporary: Path) -> bool:
    """Lock a temporary file or folder while it is filled; False where it was taken for abandoned before."""
    with contextlib.suppress(OSError):  # some network file systems lock no folders, and keep leftovers
        fcntl.flock(handle, fcntl.LOCK_EX)
    return temporary.exists()


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the temporary files and folders of this beginning that no process holds any more."""
    with contextlib.suppress(OSError):  # also where another process removes them at the same time
        for leftover in [path for path in folder.iterdir() if path.name.startswith(prefix)]:
            if leftover.is_symlink() or not (leftover.is_dir() or leftover.is_file()):
                continue
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
            except BlockingIOError:
                continue
            finally:
                os.close(handle)


def sync_folder(folder: Path) -> None:
    """Have the renames in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
