"""What several test modules share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts of random words, no two alike."""
    folder = tmp_path_factory.mktemp("experiment")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(400)]
    (folder / "text").mkdir()
    for i in range(12):
        text = " ".join(rng.choices(words, k=160)) + " é\n"
        (folder / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder
