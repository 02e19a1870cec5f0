"""Files of text: .txt, .jsonl, .json, .csv and .parquet, also packed, read as streams that are known to end."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ropelab.data.documents import Document, author_of, document, text_of, title_of

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
ENDINGS = (*(kind + packed for kind in KINDS[:-1] for packed in ("", *COMPRESSIONS)), ".parquet")
MOST_TIMES = 100  # what a packed file may unpack to, as a multiple of its size: text comes to 3 to 10
FREE = 2**24  # bytes that any file may unpack to
MOST_SHOWN = 5  # bad files that are named at once

_CHUNK = 2**20  # bytes read at a time
_ROWS = 64  # of a .parquet file read at a time
_LONGEST_FIELD = 2**31 - 1  # characters of a field of a .csv file
# byte-order marks; that of UTF-32 begins with that of UTF-16
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

Told = Callable[[int], None]  # how many bytes of the file on the disk were read


def has_ending(path: Path, endings: Sequence[str]) -> bool:
    """Does the file's name end so? A hidden file's does not."""
    return not path.name.startswith(".") and path.name.lower().endswith(tuple(ending.lower() for ending in endings))


def stem(path: Path) -> str:
    """The file's name without its kind and without .gz, .xz or .zst."""
    name = _unpacked_name(path)
    ending = next((kind for kind in KINDS if name.lower().endswith(kind)), Path(name).suffix)
    return name[: len(name) - len(ending)]


def _unpacked_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def is_json(path: Path) -> bool:
    """Does the name say that it holds JSON, packed or not?"""
    return _unpacked_name(path).lower().endswith((".json", ".jsonl"))


def is_packed(path: Path) -> bool:
    """Does the name say that it is packed?"""
    return path.suffix.lower() in COMPRESSIONS


def is_regular(path: Path) -> bool:
    """Is it, or does it lead to, a file that ends: no folder, pipe, socket or device?"""
    return path.is_file()


def leads_outside(path: Path, folder: Path) -> bool:
    """Is it a link, or below one, to a place outside of the folder that it was found in?

    The links of a snapshot in the hub's cache lead to the same repository's `blobs`, which counts as inside.
    """
    real, root = path.resolve(), folder.resolve()
    snapshots = next((part for part in (root, *root.parents) if part.parent.name == "snapshots"), None)
    return not (real.is_relative_to(root) or (snapshots and real.is_relative_to(snapshots.parent.parent / "blobs")))


def read_files(
    files: Sequence[Path], root: Path, text_field: str, progress: Callable[[int], None] = lambda n_bytes: None
) -> list[list[Document]]:
    """The documents of each file, which are called after their place below `root` where they have no title.

    progress: is told how many bytes were read in all. ValueError: names all files that cannot be read, and why.
    """
    found: list[list[Document]] = []
    bad: list[str] = []
    before = 0
    for path in files:
        try:
            name = path.relative_to(root).as_posix()
            found.append(read_documents(path, name, text_field, lambda n_bytes: progress(before + n_bytes)))  # noqa: B023
        except ValueError as error:
            bad.append(str(error))
        before += size_of(path)
        progress(before)
    if bad:
        more = f"; and {len(bad) - MOST_SHOWN} more files" if len(bad) > MOST_SHOWN else ""
        head = f"{len(bad)} files cannot be read: " if len(bad) > 1 else ""
        raise ValueError(head + "; ".join(bad[:MOST_SHOWN]) + more)
    return found


def size_of(path: Path) -> int:
    """Bytes on the disk; 0 for what is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_documents(path: Path, name: str, text_field: str, told: Told = lambda n_bytes: None) -> list[Document]:
    """The documents of one file: one of a .txt file (or of another kind), one of each row of a table that has text.

    A .jsonl file has an object a line, a .json file a list of objects, one object, or an object a line, a .csv file
    names its columns in its first line. ValueError: names the file, and the line, row or byte that is at fault.
    """
    unpacked = _unpacked_name(path).lower()
    if unpacked.endswith(".jsonl"):
        return _rows_to_documents(_json_lines(_lines(_decoded(path, told)), path), path, name, text_field)
    if unpacked.endswith(".json"):
        return _rows_to_documents(_json_rows("".join(_decoded(path, told)), path), path, name, text_field)
    if unpacked.endswith(".csv"):
        with _wide_fields():
            return _rows_to_documents(_csv_rows(_lines(_decoded(path, told)), path), path, name, text_field)
    if unpacked.endswith(".parquet"):
        return _rows_to_documents(_parquet_rows(path, text_field, told), path, name, text_field)
    return [document(name, "".join(_decoded(path, told)))]


def read_text(path: Path) -> str:
    """The text of a file, unpacked by its ending, without a byte-order mark."""
    return "".join(_decoded(path, lambda n_bytes: None))


def check_json_lines(path: Path) -> None:
    """ValueError: a line is nested so deeply that a reader written in C would crash; and whatever has no end."""
    for line in _lines(_decoded(path, lambda n_bytes: None)):
        if line.count("[") + line.count("{") > 500:
            try:
                json.loads(line)
            except RecursionError:
                raise ValueError(f"{path} holds a line that is nested too deeply: it is no text") from None
            except ValueError:  # a part of an object that is spread over lines
                continue


def check_ends(path: Path) -> None:
    """ValueError: a packed file that unpacks to far more than any text, or is damaged."""
    for _ in chunks(path, lambda n_bytes: None):
        pass


# --- bytes ------------------------------------------------------------------------------------------------------------


def chunks(path: Path, told: Told) -> Iterator[bytes]:
    """The bytes of a file, unpacked, piece by piece. ValueError: it is no regular file, damaged, or a bomb."""
    ending = path.suffix.lower()
    try:
        if not is_regular(path) and path.exists():
            raise ValueError(f"{path} is no regular file (a pipe or a device has no end): give a file")
        with path.open("rb") as raw:
            state = os.fstat(raw.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ValueError(f"{path} is no regular file: give a file")
            done = 0
            stream = _unpacked(raw, ending)
            while chunk := stream.read(_CHUNK):
                done += len(chunk)
                _check_size(path, done, state.st_size)
                told(raw.tell())
                yield chunk
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.strerror is None:  # pyarrow's
            raise _damaged(path, error) from None
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def _check_size(path: Path, done: int, size: int) -> None:
    if done > FREE and done > MOST_TIMES * size:
        raise ValueError(
            f"{path} unpacks to more than {MOST_TIMES} times its size: no text does; remove it, or unpack it yourself"
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or no {path.suffix.lower()} file ({error}): fetch it again")


def _unpacked(raw: IO[bytes], ending: str) -> Any:
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".xz":
        return lzma.LZMAFile(raw)
    if ending == ".zst":
        import pyarrow

        if not pyarrow.Codec.is_available("zstd"):
            raise ValueError(f"{raw.name} needs a pyarrow with zstd: install one, or unpack it with zstd -d")
        return pyarrow.input_stream(raw, compression="zstd")
    return raw


# --- letters ----------------------------------------------------------------------------------------------------------


def _decoded(path: Path, told: Told) -> Iterator[str]:
    """The text of a file piece by piece: UTF-8, or UTF-16 or UTF-32 by its mark. ValueError: it is empty or no text."""
    decoder: codecs.IncrementalDecoder | None = None
    encoding, start, empty = "utf-8", 0, True
    for chunk in chunks(path, told):
        if decoder is None:
            encoding = next((name for mark, name in _MARKS.items() if chunk.startswith(mark)), "utf-8")
            decoder = codecs.getincrementaldecoder(encoding)()
            if chunk.startswith(codecs.BOM_UTF8):
                chunk, start = chunk[3:], 3
        if encoding == "utf-8" and (offset := chunk.find(b"\0")) >= 0:
            raise _binary(path, f"a NUL byte at offset {start + offset}")
        text = _decode(decoder, chunk, path, start, encoding)
        if encoding != "utf-8" and "\0" in text:
            raise _binary(path, f"NUL characters in its {encoding.upper()}")
        start += len(chunk)
        empty = empty and not text
        yield text
    if decoder is not None:
        _decode(decoder, b"", path, start, encoding, final=True)
    if empty:
        raise ValueError(f"{path} is empty: remove it or give a file that holds text")


def _decode(
    decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, start: int, encoding: str, *, final: bool = False
) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:  # its object begins with what was left of the chunk before
        offset = start - (len(error.object) - len(chunk)) + error.start
        raise ValueError(
            f"{path} is not {encoding.upper()} (byte 0x{error.object[error.start]:02x} at offset {offset}): convert "
            "it, for example with iconv -f latin1 -t utf-8"
        ) from None


def _binary(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is binary ({what}), not text: remove it or give a text file")


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines without their ends. Not splitlines(): that also cuts at U+2028 and its like, which JSON may hold."""
    rest: list[str] = []  # of a line that is not complete: joined once, however long it is
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield "".join(rest)


# --- rows -------------------------------------------------------------------------------------------------------------

Row = tuple[int, str, Any]  # its number, where it is in words, and what it holds


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number},"
            yield number, where, _json(line, f"{where} is not JSON", "one object a line is needed")


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    """A list of objects, one object, or an object a line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text[: error.pos + 1]:
            yield from _json_lines(text.split("\n"), path)
            return
        found = _json(text, f"{path} is not JSON", "repair it")
    except (ValueError, RecursionError):
        found = _json(text, f"{path} is not JSON", "repair it")
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        yield number, f"{path}, item {number},", row


def _json(text: str, wrong: str, needed: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{wrong} (it is nested too deeply): {needed}") from None
    except ValueError as error:
        raise ValueError(f"{wrong} ({error}): {needed}") from None


@contextmanager
def _wide_fields() -> Iterator[None]:
    """`csv` refuses fields of more than 128 KiB, which a text easily is; its limit is one for the whole process."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_rows(lines: Iterable[str], path: Path) -> Iterator[Row]:
    reader = csv.DictReader((line + "\n" for line in lines), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            yield number, f"{path}, row {number},", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}, is not CSV ({error}): repair it") from None


def _parquet_rows(path: Path, text_field: str, told: Told) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if not is_regular(path):
        raise ValueError(f"{path} is no regular file: give a file")
    size, done, number = size_of(path), 0, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            top = {text_field if text_field in names else text_field.partition(".")[0], "title", "id", "author"}
            wanted = [name for name in names if name in top]
            if text_field.partition(".")[0] not in names and text_field not in names:
                wanted = names  # to say what there is
            for batch in file.iter_batches(_ROWS, columns=wanted):
                done += batch.nbytes
                _check_size(path, done, size)
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{path}, row {number},", row
                told(min(size, size * number // max(1, file.metadata.num_rows)))
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} is damaged or no .parquet file ({' '.join(str(error).split())}): fetch it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): fetch it again") from None


def _rows_to_documents(rows: Iterable[Row], path: Path, name: str, text_field: str) -> list[Document]:
    documents = []
    for number, where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{where} is no JSON object: it must look like {{"{text_field}": "..."}}')
        if body := text_of(row, text_field, where):
            try:
                documents.append(document(title_of(row) or f"{name}:{number}", body, author_of(row)))
            except UnicodeEncodeError as error:
                raise ValueError(f"{where} has half a surrogate pair at character {error.start}: repair it") from None
    if not documents:
        raise ValueError(f"{path} holds no text: every row's '{text_field}' is empty")
    return documents
