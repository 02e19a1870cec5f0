"""Files of the cache: written to a temporary name, synced, renamed, so that a name in the cache is a whole file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in its one canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a file of the cache, or None when there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False)
            sync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder of the cache; ValueError where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cache_dir cannot be written ({path}: {error.strerror}): set cache_dir or ROPELAB_CACHE to another folder"
        ) from None


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` to write files into, removed at the end if it was not published."""
    make_folder(final.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name[:16]}-", dir=final.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> bool:
    """Rename a finished folder to its place; False when another process was first (its folder stays)."""
    temporary.chmod(0o755)
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
    """Remove a damaged folder: renamed first, so that its name never stands for half of it."""
    with new_folder(folder) as temporary, contextlib.suppress(FileNotFoundError):
        folder.rename(temporary / "damaged")


def sync(handle: int) -> None:
    """Have a file's contents on the disk before it is renamed."""
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Have the renames in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
