"""The outside oracle that several files here compare with."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest


@pytest.fixture(scope="session")
def x_transformers() -> Any:
    """The module of x-transformers that holds its position encodings; importing it warns of torch.jit on its behalf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("x_transformers.x_transformers")
