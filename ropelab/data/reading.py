"""Files of text: .txt, .jsonl, .json, .csv and .parquet, also packed, read as streams that are known to end."""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import lzma
import os
import stat
import tarfile
import zipfile
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


def check_bounded(path: Path, name: str) -> None:
    """ValueError: a file that `datasets` would unpack, or read, to far more than any text, or would crash of.

    That looks into a file, whatever it is called: so does this. name: says what is in it (`is_json`).
    """
    if not is_regular(path):
        raise ValueError(f"{path} is no regular file: give a file")
    packed = _packed_as(path)
    if packed == ".parquet":
        check_parquet(path)
    elif packed == ".zip":
        _check_zip(path)
    elif packed == ".tar":
        _check_tar(path)
    elif packed and packed not in COMPRESSIONS:
        raise ValueError(f"{path} is packed as {packed[1:]}, of which it is not known what it unpacks to: unpack it")
    elif is_json(Path(name)):
        _check_nesting(path, chunks(path, lambda n_bytes: None, packed))
    elif packed:
        for _ in chunks(path, lambda n_bytes: None, packed):
            pass


# what files of a kind begin with
_MAGIC = {b"PAR1": ".parquet", b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst",
          b"PK\x03\x04": ".zip", b"PK\x05\x06": ".zip", b"BZh": ".bz2", b"7z\xbc\xaf\x27\x1c": ".7z", b"Rar!": ".rar",
          b"\x04\x22\x4d\x18": ".lz4"}  # fmt: skip


def _packed_as(path: Path) -> str:
    """What a file is packed as, by what it begins with; empty for what is not."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    found = next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), "")
    return ".tar" if found in ("", ".gz", ".xz", ".bz2") and _is_tar(path) else found


def _is_tar(path: Path) -> bool:
    """Is it an archive of tar, packed or not? It is only looked into as far as its first header."""
    try:
        return tarfile.is_tarfile(path)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error):
        return False


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            done = 0
            for member in archive.infolist():  # no more is unpacked of each than this says
                done += member.file_size
                _check_size(path, done, size_of(path))
            for member in archive.infolist():
                _check_member(path, member.filename, lambda: archive.open(member))  # noqa: B023
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _check_tar(path: Path) -> None:
    try:
        with tarfile.open(path) as archive:
            done = 0
            for member in archive:
                done += member.size
                _check_size(path, done, size_of(path))
                if member.isfile():
                    _check_member(path, member.name, lambda: archive.extractfile(member))  # noqa: B023
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _check_member(path: Path, name: str, opened: Callable[[], Any]) -> None:
    """A file in an archive: none that is packed itself, and JSON as of `_check_nesting`."""
    if name.endswith("/"):
        return
    with opened() as file:
        head = file.read(8)
        if any(head.startswith(magic) for magic in _MAGIC):
            raise ValueError(
                f"{path} holds a packed file, {name[:80]!r}: unpack {path.name}, so that it can be looked at"
            )
        if is_json(Path(name)):
            _check_nesting(path, itertools.chain([head], iter(lambda: file.read(_CHUNK), b"")))


def _check_nesting(path: Path, pieces: Iterable[bytes]) -> None:
    """ValueError: a line is nested so deeply that a reader written in C would crash; and whatever has no end."""
    for line in _lines(_letters(path, pieces)):
        if line.count("[") + line.count("{") > 500:
            try:
                json.loads(line)
            except RecursionError:
                raise ValueError(f"{path} holds a line that is nested too deeply: it is no text") from None
            except ValueError:  # a part of an object that is spread over lines
                continue


# --- bytes ------------------------------------------------------------------------------------------------------------


def chunks(path: Path, told: Told, packed: str | None = None) -> Iterator[bytes]:
    """The bytes of a file, unpacked, piece by piece. ValueError: it is no regular file, damaged, or a bomb.

    packed: one of `COMPRESSIONS`, or empty; without it, as the name says.
    """
    ending = path.suffix.lower() if packed is None else packed
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
    """The text of a file piece by piece, as of `_letters`."""
    yield from _letters(path, chunks(path, told))


def _letters(path: Path, pieces: Iterable[bytes]) -> Iterator[str]:
    """Text piece by piece: UTF-8, or UTF-16 or UTF-32 by its mark. ValueError: it is empty or no text."""
    decoder: codecs.IncrementalDecoder | None = None
    encoding, start, empty = "utf-8", 0, True
    for chunk in pieces:
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
    if not is_regular(path):
        raise ValueError(f"{path} is no regular file: give a file")
    size, number = size_of(path), 0
    with _opened_parquet(path) as file:
        names = file.schema_arrow.names
        top = {text_field if text_field in names else text_field.partition(".")[0], "title", "id", "author"}
        wanted = [name for name in names if name in top]
        if text_field.partition(".")[0] not in names and text_field not in names:
            wanted = names  # to say what there is
        check_parquet(path, wanted)
        for batch in file.iter_batches(_ROWS, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield number, f"{path}, row {number},", row
            told(min(size, size * number // max(1, file.metadata.num_rows)))


@contextmanager
def _opened_parquet(path: Path, **how: Any) -> Iterator[Any]:
    """A .parquet file. ValueError: it is damaged, or cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, **how) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} is damaged or no .parquet file ({' '.join(str(error).split())}): fetch it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): fetch it again") from None


def check_parquet(path: Path, names: Sequence[str] | None = None) -> None:
    """ValueError: the columns of these names (of all) come to far more than any text, or are damaged.

    What is fixed in length is counted as the file declares it. Texts can stand in it once for many rows: they are
    read so, and counted for each row.
    """
    size, done = size_of(path), 0
    with _opened_parquet(path) as file:
        schema, groups = file.metadata.schema, file.metadata.num_row_groups
        columns = [schema.column(index) for index in range(len(schema))]
        columns = [one for one in columns if names is None or one.path.partition(".")[0] in names or one.path in names]
        at = {schema.column(index).path: index for index in range(len(schema))}
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        short: set[int] = set()  # groups of which a row at a time is read: a text may continue the one before
        for group in range(groups):
            rows = file.metadata.row_group(group)
            done += 4 * rows.num_rows
            for column in columns:
                chunk = rows.column(at[column.path])
                done += chunk.total_uncompressed_size
                if column.path not in texts:
                    done += chunk.num_values * max(8, column.length or 0)
                elif "DELTA_BYTE_ARRAY" in chunk.encodings:
                    short.add(group)
            _check_size(path, done, size)
    done = 0
    for singly in (False, True):
        with _opened_parquet(path, read_dictionary=[] if singly else texts) as file:
            for group in [group for group in range(groups if texts else 0) if (group in short) is singly]:
                many = 1 if singly else max(1, file.metadata.row_group(group).num_rows)
                for batch in file.iter_batches(many, row_groups=[group], columns=texts):
                    done += sum(_spelled_out(column) for column in batch.columns)
                    _check_size(path, done, size)


def _spelled_out(array: Any) -> int:
    """Bytes of an array whose texts stand in it once for many rows, as if they stood in each."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(array.dictionary).cast("int64")
        return int(pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return sum(_spelled_out(array.field(index)) for index in range(kind.num_fields))
    if pyarrow.types.is_map(kind):
        return _spelled_out(array.keys) + _spelled_out(array.items)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _spelled_out(array.flatten())
    return int(array.nbytes)


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
