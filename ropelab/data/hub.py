"""Datasets of the Hugging Face hub, or local folders in its layout, through `datasets`: never from a stream."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from ropelab import files
from ropelab.data.documents import Document, Progress, author_of, document, offer_fields, title_of
from ropelab.data.reading import check_bounded, leads_outside
from ropelab.errors import DamagedFileError

CARD_LIMIT = 2**22  # bytes of a dataset's card
_ROWS = 1000  # read at a time
_STRINGS = ("string", "large_string")  # types of a field that holds text


class HubDocuments(Sequence[Document]):
    """The rows of one split of a dataset that have text, read from the disk whenever they are asked for.

    rows: a `datasets.Dataset`. label: its split, of which rows without a title are called after.
    kept: which rows; without it, those whose text is not empty.
    """

    def __init__(self, rows: Any, text_field: str, label: str, kept: Sequence[int] | None = None) -> None:
        self._rows, self._text_field, self._label = rows, text_field, label
        self._kept: Sequence[int] = range(len(rows))
        self._kept = [index for index, row in enumerate(self) if row.n_bytes] if kept is None else kept

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> HubDocuments: ...
    def __getitem__(self, index: int | slice) -> Document | HubDocuments:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._document(self._kept[index], self._rows[self._kept[index]])

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self._kept), _ROWS):
            numbers = list(self._kept[start : start + _ROWS])
            columns = self._rows[numbers]
            for place, number in enumerate(numbers):
                yield self._document(number, {name: column[place] for name, column in columns.items()})

    def select(self, indices: Sequence[int]) -> HubDocuments:
        """Only these of the documents."""
        return HubDocuments(self._rows, self._text_field, self._label, [self._kept[index] for index in indices])

    def _document(self, number: int, row: dict[str, Any]) -> Document:
        return document(title_of(row) or f"{self._label}:{number}", row[self._text_field] or "", author_of(row))


def load_hub(path: str, subset: str | None, *, follow: bool = False) -> Any:
    """The dataset with its splits (a `datasets.DatasetDict`). ValueError: why it cannot be loaded, in one line.

    follow: links of a local folder may lead outside of it, as the first versions had it.
    """
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    # versions before 4 would ask on a terminal whether a dataset's own Python may run: it may not
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    # each retry would be a warning; what it comes to is said once
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        if Path(path).exists():
            _check_card(Path(path))
        builder = datasets.load_dataset_builder(path, subset)
        if Path(path).exists():
            _check_files(Path(path), builder.config.data_files or {}, follow=follow)
        builder.download_and_prepare(dl_manager=_checking(builder))
        return builder.as_dataset()
    except Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever goes wrong in there comes from the dataset or the network
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"data.path={path} cannot be loaded as a dataset ({type(cause).__name__}: {' '.join(str(cause).split())}):"
            " check data.path and data.subset, and the network if it is to come from the hub"
        ) from None


class Refused(ValueError):
    """What a local dataset asks for and does not get."""


def _check_card(folder: Path) -> None:
    """`Refused`: the card of a local dataset names places that are no part of it. Before anything looks there.

    A card is the YAML at the head of README.md, or all of .huggingface.yaml; every string under `data_files` and
    `data_dir` is such a name.
    """
    names: list[str] = []
    for card, pattern in ((folder / "README.md", r"\ufeff?---\s*\n(.*?)\n---"), (folder / ".huggingface.yaml", "(.*)")):
        if not card.exists():
            continue
        try:
            text = files.read(card, limit=CARD_LIMIT, follow=True).decode("utf-8", "replace")
            if found := re.match(pattern, text, re.S):
                names += _names(files.parse_yaml(found[1])[0])
        except DamagedFileError as error:
            raise Refused(f"{card} holds a dataset card that cannot be read ({error}); remove it") from None
    for name in names:
        if "://" in name or "::" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise Refused(
                f"data.path={folder} names a file outside of itself, {name}, in its README.md: remove that, or give "
                "data.path the folder that is meant"
            )


def _names(value: Any, *, inside: bool = False) -> Iterator[str]:
    """The strings of a card that name files or folders."""
    if isinstance(value, str) and inside:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _names(inner, inside=inside or key in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner, inside=inside)


def _check_files(folder: Path, data_files: Mapping[Any, Iterable[Any]], *, follow: bool) -> None:
    """`Refused`: a local dataset's card names files outside of its folder."""
    for name in (str(file) for part in data_files.values() for file in part):
        file = Path(os.path.normpath(name))
        if "://" in name or "::" in name or not file.is_relative_to(folder.resolve()):
            raise Refused(
                f"data.path={folder} names a file outside of itself, {name}, in its README.md: remove that, or give "
                "data.path the folder that is meant"
            )
        if not follow and leads_outside(file, folder):
            raise Refused(f"{name} is a link to outside of data.path={folder}: put the file itself there")


def _checking(builder: Any) -> Any:
    """What fetches a dataset's files, which are checked (`check_bounded`) before any is unpacked or read.

    `Refused`: a file that `datasets` would die of, or that unpacks without an end.
    """
    import datasets

    class Checking(datasets.DownloadManager):  # type: ignore[misc]
        def download(self, url_or_urls: Any) -> Any:
            fetched = super().download(url_or_urls)
            for name, path in _pairs(url_or_urls, fetched):
                try:
                    check_bounded(Path(path), name.partition("?")[0])
                except ValueError as error:
                    raise Refused(str(error)) from None
            return fetched

    return Checking(
        dataset_name=builder.dataset_name,
        data_dir=builder.config.data_dir,
        base_path=builder.base_path,
        download_config=datasets.DownloadConfig(  # as `datasets` has it, so that what was fetched before is found
            cache_dir=builder._cache_downloaded_dir, use_etag=False, token=builder.token,
            storage_options=builder.storage_options,
        ),
    )  # fmt: skip


def _pairs(names: Any, paths: Any) -> Iterator[tuple[str, str]]:
    """(name, path) of whatever a structure of names was fetched to, which has the same structure."""
    if isinstance(names, dict):
        for key, inner in names.items():
            yield from _pairs(inner, paths[key])
    elif isinstance(names, list | tuple):
        for one, path in zip(names, paths, strict=True):
            yield from _pairs(one, path)
    else:
        yield str(names), str(paths)


def read_split(rows: Any, label: str, path: str, text_field: str, progress: Progress | None) -> HubDocuments:
    """The documents of one split. ValueError: there is no such field, or it holds no strings; names those that do."""
    if text_field not in rows.features:
        rows = rows.flatten()  # document.text is a column of its own then
    strings = _strings(rows)
    if text_field not in strings:
        inner = [name for name in _strings(rows.flatten()) if name.startswith(f"{text_field}.")]
        has = "holds no strings in" if text_field in rows.features or inner else "has no field"
        raise ValueError(f"data.path={path} {has} '{text_field}': {offer_fields(inner or strings)}")
    if progress:
        progress(f"reading {label}", 0, 1)
    wanted = [name for name in (text_field, "title", "id", "author") if name in rows.features]
    documents = HubDocuments(rows.select_columns(wanted), text_field, label)
    if progress:
        progress(f"reading {label}", 1, 1)
    return documents


def _strings(rows: Any) -> list[str]:
    return [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _STRINGS]


def wikitext_lines(rows: Any, text_field: str) -> Iterator[str]:
    """The lines of WikiText from its dataset on the hub, where a row is a line and an empty line an empty string."""
    for start in range(0, len(rows), _ROWS):
        for line in rows[start : start + _ROWS][text_field]:
            yield line or " \n"
