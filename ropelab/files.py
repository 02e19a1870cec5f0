"""Files that are whole or not there: written under a temporary name, synced, renamed. And digests of content.

A temporary file or folder has a name that only this module gives: a mark, the machine, a random token, and a checksum
of these. It is locked by the process that fills it. Only what has such a name is ever cleared away, and only when the
process that made it is gone.

What is removed or cut short is named together with the folder that it must lie in: a path that leaves that folder, or
reaches into it through a link, is refused.

A JSON object can be sealed: it then holds a digest of itself, so that a flipped bit is no other number.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ropelab.errors import DamagedFileError, OutsideError

JSON_LIMIT = 2**24  # bytes of a JSON file, where its reader says nothing else
YAML_LIMIT = 2**20  # bytes of a YAML file
YAML_NODES = 100_000  # values in it
DIGITS = 40  # of a whole number in JSON; what is longer is no length, count or time of ours
Types = tuple[type, ...]


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in its one canonical form, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *, limit: int = JSON_LIMIT, follow: bool = False, finite: bool = True) -> Any:
    """`load_json`, or None when there is no such file or it is damaged, its seal included."""
    try:
        return load_json(path, limit=limit, follow=follow, finite=finite)
    except (OSError, ValueError):
        return None


def load_json(path: Path, *, limit: int = JSON_LIMIT, follow: bool = False, finite: bool = True) -> Any:
    """The value in a JSON file of at most `limit` bytes; of a sealed object what was sealed.

    `DamagedFileError` where it is no such file; `OSError` where none is there. A link counts as none, unless `follow`.
    `finite`: as of `parse_json`.
    """
    return unsealed(parse_json(read(path, limit=limit, follow=follow), finite=finite))


def read(path: Path, *, limit: int, follow: bool = False) -> bytes:
    """The content of a file of at most `limit` bytes. `DamagedFileError` for a larger one, a pipe, a device, a link.

    `follow`: is a link followed to the file that it leads to?
    """
    try:  # a pipe would be waited for without an end
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedFileError("it is a link") from None
        raise
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise DamagedFileError("it is no file")
        if state.st_size > limit:
            raise DamagedFileError(f"it has {state.st_size} bytes, and {limit} are the most that is read")
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(limit)
    finally:
        os.close(handle)


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value that a JSON text spells. `DamagedFileError` where it is none, nested too deeply, or holds no number.

    A whole number of more than `DIGITS` digits is none; neither, if `finite`, are Infinity, NaN and what is beyond a
    float.
    """
    number = _finite if finite else float
    try:
        return json.loads(text, parse_int=_whole, parse_float=number, parse_constant=number)
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(f"it is truncated or altered: {error}") from None
    except RecursionError:
        raise DamagedFileError("it is nested too deeply") from None


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise DamagedFileError(f"it holds a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DamagedFileError(f"it holds a number that is not finite: {text[:20]}")
    return number


def load_yaml(path: Path) -> tuple[Any, Any]:
    """(value, root node) of a YAML file of at most `YAML_LIMIT` bytes: plain data, and the nodes as they are written.

    `DamagedFileError` where it is none, or its aliases make it more than `YAML_NODES` values; `OSError` without a file.
    """
    return parse_yaml(read(path, limit=YAML_LIMIT, follow=True))


def parse_yaml(text: str | bytes) -> tuple[Any, Any]:
    """`load_yaml`, of a text."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _expanded(node, {}) > YAML_NODES:
            raise DamagedFileError("its aliases make it too large")
        return yaml.safe_load(text), node
    except DamagedFileError:
        raise
    except RecursionError:
        raise DamagedFileError("it is nested too deeply") from None
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:  # a plain one for a number of thousands of digits
        raise DamagedFileError(f"it is no valid YAML: {' '.join(str(error).split())[:300]}") from None


def _expanded(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node comes to with its aliases; infinite where one leads back to its own node."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if node is not None and isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def mistyped(
    item: Any, needed: Mapping[str, Types], other: Mapping[str, Types] | None = None, *, where: str = ""
) -> str | None:
    """What of a JSON value is not as it has to be; None where all is well.

    `needed`: the types of the keys that an object must have; `other`: of those that it may have. `where`: said before
    a key. True and False are no numbers, and neither is what is not finite.
    """
    if not isinstance(item, dict):
        return f"{where.rstrip('.') or 'it'} is no JSON object"
    if (missing := next((key for key in needed if key not in item), None)) is not None:
        return f"{where}{missing} is missing"
    for key, kinds in {**needed, **(other or {})}.items():
        if key in item and not is_of(item[key], kinds):
            return f"{where}{key} is {type(item[key]).__name__}"
    return None


def is_of(value: Any, kinds: Types) -> bool:
    """Is a JSON value of one of these types? True and False are no numbers, and neither is what is not finite."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) and (not isinstance(value, float) or math.isfinite(value))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself in it."""
    return {**value, "seal": {"sha256": digest_of(value)}}


def unsealed(value: Any) -> Any:
    """What was sealed; a value without a seal as it is. `DamagedFileError` where the seal does not fit."""
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
        raise DamagedFileError('it was altered since it was written (if on purpose, remove its "seal")')
    return rest


def write(path: Path, content: bytes) -> None:
    """Write a file; a reader sees the old one or the whole new one. `OSError` names the file.

    What is there is replaced, a link too. `OutsideError` where it is, or leads to, a device, a pipe or a folder.
    """
    if path.exists() and not path.is_file():
        raise OutsideError(f"{path} is a device, a pipe or a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(path.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.parent / _temporary_name()
        with naming(path):
            handle = os.open(temporary, flags, 0o666)
        if _held(handle, temporary):
            break
        os.close(handle)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole. `ValueError` for a number that is not finite: JSON has none."""
    write(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal, as a whole."""
    # as it will be read: tuples are lists there, and every key a string
    write_json(path, sealed(json.loads(json.dumps(value, allow_nan=False))))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an `OSError` name this file: one of a write or of a sync, as on a full disk, names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` to write files into, removed at the end if it was not published.

    An `OSError` of a file in it names that file as it would have been called.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(final.parent)
    while True:
        temporary = final.parent / _temporary_name()
        with naming(final):
            temporary.mkdir(mode=0o700)
        handle = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        if _held(handle, temporary):
            break
        os.close(handle)
    try:
        yield temporary
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, str) else None
        if path is None or not path.is_relative_to(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(final / path.relative_to(temporary))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def publish(temporary: Path, final: Path) -> bool:
    """Rename a finished folder to its place; False when another process was first (its folder stays).

    What is in it gets the rights of files and folders that the user makes: safetensors makes private ones.
    """
    mask = _umask()
    for path in (temporary, *temporary.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    sync(temporary)
    try:
        temporary.rename(final)
    except OSError:
        if not final.exists():
            raise
        return False
    sync(final.parent)
    return True


def own(path: Path, within: Path) -> Path:
    """A path below the folder `within`, which may itself be a link. `OutsideError` where another link is on the way."""
    try:
        parts = path.relative_to(within).parts
    except ValueError:
        parts = ()
    if not parts or ".." in parts:
        raise OutsideError(f"{path} does not lie in {within}")
    here = within
    for part in parts:
        here = here / part
        if here.is_symlink():
            raise OutsideError(
                f"{here} is a link, and none is followed in {within}: move what it leads to into its place (mv), or "
                "move the whole folder and leave a link to that"
            )
    return path


def remove(path: Path, *, within: Path) -> None:
    """Remove a file or a folder below `within`, should it be there. `OutsideError`, and nothing is done, as of `own`.

    A folder is renamed first, so that its name never stands for half of it.
    """
    own(path, within)
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with new_folder(path) as temporary, contextlib.suppress(FileNotFoundError):
        path.rename(temporary / "removed")


def truncate(path: Path, size: int, *, within: Path) -> None:
    """Cut a file below `within` to `size` bytes. `OutsideError`, and nothing is done, as of `own`."""
    handle = os.open(own(path, within), os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.ftruncate(handle, size)
    finally:
        os.close(handle)


def append(path: Path, text: str, *, within: Path) -> None:
    """Add to a text file below `within`, which is made. `OutsideError` as of `own`; an `OSError` names the file."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with naming(path), os.fdopen(os.open(own(path, within), flags, 0o666), "ab") as file:
        file.write(text.encode())


def open_lock(folder: Path) -> int:
    """A descriptor of the file `lock` in a folder, which is made. No link is followed: `OSError`."""
    return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def is_locked(path: Path) -> bool:
    """Does a process hold the lock on this file? Nobody holds one that is not there, is a link or cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # of a file system without locks, where nobody gets one
        return False
    finally:
        os.close(handle)
    return False


def clear_abandoned(folder: Path, *, any_machine: bool = False) -> None:
    """Remove the temporary files and folders in `folder` that were left by processes which are gone.

    Those of other machines, whose locks need not be seen here, only where the caller knows that nobody else writes in
    this folder (`any_machine`).
    """
    with contextlib.suppress(OSError):  # also where another process removes them at the same time
        for leftover in [path for path in folder.iterdir() if is_temporary(path.name)]:
            if leftover.is_symlink() or not (any_machine or f"-{_machine()}-" in leftover.name):
                continue
            handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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


def is_temporary(name: str) -> bool:
    """Is this the name of a temporary file or folder that this module made?"""
    found = re.fullmatch(r"\.ropelab-tmp-([0-9a-f]{8})-([0-9a-f]{16})-([0-9a-f]{8})", name)
    return found is not None and found[3] == _checksum(found[1], found[2])


def _temporary_name() -> str:
    token = secrets.token_hex(8)
    return f".ropelab-tmp-{_machine()}-{token}-{_checksum(_machine(), token)}"


def _checksum(machine: str, token: str) -> str:
    return hashlib.sha256(f"ropelab {machine} {token}".encode()).hexdigest()[:8]


@functools.cache
def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _held(handle: int, temporary: Path) -> bool:
    """Lock a temporary file or folder while it is filled; False where it was taken for abandoned before."""
    with contextlib.suppress(OSError):  # some network file systems lock no folders, and keep leftovers
        fcntl.flock(handle, fcntl.LOCK_EX)
    return temporary.exists()


def sync(path: Path) -> None:
    """Have the content of a file, or the renames in a folder, on the disk. An `OSError` names it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
