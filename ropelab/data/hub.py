"""Datasets of the Hugging Face hub, or local folders in its layout, through `datasets`: never from a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from ropelab.data.documents import Document, Progress, author_of, document, offer_fields, title_of

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


def load_hub(path: str, subset: str | None) -> Any:
    """The dataset with its splits (a `datasets.DatasetDict`). ValueError: why it cannot be loaded, in one line."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    # versions before 4 would ask on a terminal whether a dataset's own Python may run: it may not
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    # each retry would be a warning; what it comes to is said once
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return datasets.load_dataset(path, subset)
    except Exception as error:  # whatever goes wrong in there comes from the dataset or the network
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"data.path={path} cannot be loaded as a dataset ({type(cause).__name__}: {' '.join(str(cause).split())}):"
            " check data.path and data.subset, and the network if it is to come from the hub"
        ) from None


def read_split(rows: Any, label: str, path: str, text_field: str, progress: Progress | None) -> HubDocuments:
    """The documents of one split. ValueError: there is no such field, or it holds no strings; names those that do."""
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    if text_field not in strings:
        has = "holds no strings in" if text_field in rows.features else "has no field"
        raise ValueError(f"data.path={path} {has} '{text_field}': {offer_fields(strings)}")
    if progress:
        progress(f"reading {label}", 0, 1)
    wanted = [name for name in (text_field, "title", "id", "author") if name in rows.features]
    documents = HubDocuments(rows.select_columns(wanted), text_field, label)
    if progress:
        progress(f"reading {label}", 1, 1)
    return documents


def wikitext_lines(rows: Any, text_field: str) -> Iterator[str]:
    """The lines of WikiText from its dataset on the hub, where a row is a line and an empty line an empty string."""
    for start in range(0, len(rows), _ROWS):
        for line in rows[start : start + _ROWS][text_field]:
            yield line or " \n"
