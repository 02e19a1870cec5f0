"""A disk that fails: the n-th write, fsync, rename or creation below a folder is refused, as by the system.

What a program calls is replaced for a while: `open`, `os.open`, `os.write`, `os.fsync`, `os.rename`, `os.mkdir` and
what safetensors writes with. Half of a write that fails is on the disk, as when the last block was full. What other
native code writes by itself is not seen.
"""
# Path calls what is replaced here
# ruff: noqa: PTH100, PTH112, PTH115, PTH118, PTH120, PTH202

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ERRNO = {"write": errno.ENOSPC, "fsync": errno.EIO, "rename": errno.EIO, "create": errno.EDQUOT}
CREATES = re.compile("[wax]")


class Operation(NamedTuple):
    """What was asked of the disk: its kind, and the file below the folder (of a rename, what it becomes)."""

    kind: str
    name: str

    @property
    def place(self) -> str:
        """The kind and the name without what differs each time: numbers, digests and temporary names."""
        name = re.sub(r"\.ropelab-tmp-[-0-9a-f]+", "TEMPORARY", self.name)
        return f"{self.kind} {re.sub(r'[0-9a-f]{8,}|[0-9]+', '#', name)}"


class Shim:
    """Counts the operations below a folder; from `first` on it refuses one, or with `lasting` all that follow too.

    `first` 0 refuses none. What is renamed is done when it is in `done`.
    """

    def __init__(self, within: Path, first: int = 0, *, lasting: bool = False) -> None:
        self._within = os.path.realpath(within) + os.sep
        self._first, self._lasting = first, lasting
        self.seen: list[Operation] = []
        self.refused: list[Operation] = []
        self.done: list[Operation] = []

    def below(self, path: Any) -> str | None:
        """The name of a file below the folder, given by path or descriptor; None for one elsewhere."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
            except OSError:
                return None
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        full = os.path.join(os.path.realpath(folder), name)
        return full.removeprefix(self._within) if full.startswith(self._within) else None

    def ask(self, kind: str, name: str | None, half: Callable[[], object] = lambda: None) -> None:
        """Count an operation. `OSError` where it is refused, once `half` of it is done."""
        if name is None:
            return
        operation = Operation(kind, name)
        self.seen.append(operation)
        number = len(self.seen)
        if self._first and (number == self._first or (self._lasting and number > self._first)):
            self.refused.append(operation)
            half()
            raise OSError(ERRNO[kind], os.strerror(ERRNO[kind]))
        self.done.append(operation)

    def report(self, path: Path) -> None:
        """Write what was counted, for another process."""
        path.write_text(json.dumps({"seen": self.seen, "refused": self.refused, "done": self.done}), encoding="utf-8")


@contextlib.contextmanager
def failing(within: Path, first: int = 0, *, lasting: bool = False) -> Iterator[Shim]:
    """Within this process, have the `first`-th operation below a folder fail (`Shim`)."""
    shim = Shim(within, first, lasting=lasting)
    with contextlib.ExitStack() as stack:
        for module, name, replacement in _replacements(shim):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        yield shim


def _replacements(shim: Shim) -> list[tuple[Any, str, Callable[..., Any]]]:
    import safetensors.torch
    from safetensors import SafetensorError

    plain = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace", "mkdir")}
    plain_open, plain_serialize = io.open, safetensors.torch.serialize_file

    class Raw(io.FileIO):
        error: OSError | None = None  # of the rest of a write of which half was done

        def write(self, data: Any, /) -> int:
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            try:
                shim.ask("write", shim.below(self.fileno()))
            except OSError as error:
                view = memoryview(data).cast("B")
                if len(view) < 2 or len(shim.refused) > 1:  # the last block is full
                    raise
                self.error = error
                return super().write(view[: len(view) // 2])
            return super().write(data)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
                  errors: str | None = None, newline: str | None = None, closefd: bool = True,
                  opener: Any = None) -> Any:  # fmt: skip
        name = shim.below(file) if CREATES.search(mode) or "+" in mode else None
        if name is None:
            return plain_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if CREATES.search(mode) and not isinstance(file, int) and not os.path.lexists(file):
            _named(file, lambda: shim.ask("create", name))
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and dir_fd is None and not os.path.lexists(path):
            _named(path, lambda: shim.ask("create", shim.below(path)))
        return int(plain["open"](path, flags, mode, dir_fd=dir_fd))

    def os_write(handle: int, data: Any) -> int:
        view = memoryview(data).cast("B")
        shim.ask("write", shim.below(handle), lambda: plain["write"](handle, view[: len(view) // 2]))
        return int(plain["write"](handle, data))

    def os_fsync(handle: Any) -> None:
        shim.ask("fsync", shim.below(handle if isinstance(handle, int) else handle.fileno()))
        plain["fsync"](handle)

    def renaming(name: str) -> Callable[..., None]:
        def rename(source: Any, target: Any, **more: Any) -> None:
            _named(source, lambda: shim.ask("rename", shim.below(target)), target)
            plain[name](source, target, **more)

        return rename

    def os_mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if dir_fd is None and not os.path.lexists(path) and os.path.isdir(os.path.dirname(os.path.abspath(path))):
            _named(path, lambda: shim.ask("create", shim.below(path)))
        plain["mkdir"](path, mode, dir_fd=dir_fd)

    def serialize(tensors: Any, path: Any, metadata: Any = None) -> None:
        def half() -> None:  # what an old safetensors leaves, which writes into the file itself
            plain_serialize(tensors, path, metadata=metadata)
            os.truncate(path, os.path.getsize(path) // 2)

        try:
            shim.ask("write", shim.below(path), half)
        except OSError as error:
            words = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(words) from None
        plain_serialize(tensors, path, metadata=metadata)

    return [
        (builtins, "open", open_file), (io, "open", open_file), (os, "open", os_open), (os, "write", os_write),
        (os, "fsync", os_fsync), (os, "rename", renaming("rename")), (os, "replace", renaming("replace")),
        (os, "mkdir", os_mkdir), (safetensors.torch, "serialize_file", serialize),
    ]  # fmt: skip


def _named(path: Any, ask: Callable[[], None], other: Any = None) -> None:
    """The error of a call that was given a path names it; one of a write or a sync does not."""
    try:
        ask()
    except OSError as error:
        names = (os.fspath(path),) if other is None else (os.fspath(path), None, os.fspath(other))
        raise OSError(error.errno, error.strerror, *names) from None
