"""Shared by the data tests: configurations and the real texts, where they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ropelab.config import DataConfig

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def config() -> MakeConfig:
    def make(name: str = "text", path: object = None, **values: object) -> DataConfig:
        defaults = {"subset": None, "tokenizer": "bytes", "vocab_size": 300, "tokenizer_path": None}
        return DataConfig(
            name=name,
            path=None if path is None else str(path),
            **({"text_field": "text"} | defaults | values),  # type: ignore[arg-type]
        )

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of books/, nonfiction/, wikitext/, tinyshakespeare/ and gpt2-tokenizer/."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("ROPELAB_DATA") or beside)
    if not (folder / "books").is_dir():
        pytest.skip("the real texts are not here: set ROPELAB_DATA")
    return folder
