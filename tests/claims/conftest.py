"""Shared by the tests of claims: a folder of configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.claims.synthetic import CELL


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of configurations with one cell and the names of four scalings."""
    for name in ("claim", "cell", "scaling"):
        (tmp_path / name).mkdir()
    for name in ("none", "ntk", "yarn", "dynamic_ntk"):
        (tmp_path / "scaling" / f"{name}.yaml").touch()
    (tmp_path / "cell" / "toy.yaml").write_text(yaml.safe_dump(CELL))
    return tmp_path
