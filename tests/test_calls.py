"""What one evaluation under four scalings does, counted: nothing is read, hashed, drawn or worked out twice."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "count_calls.py"


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("count_calls", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_evaluation_takes_the_short_way(counting: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text"
    for number in range(24):
        place = text / ("train" if number < 14 else "test") / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(" ".join(str((number + 1) * k) for k in range(60)))
    runs_dir, cache = tmp_path / "runs", f"cache_dir={tmp_path / 'cache'}"
    counting.command(
        "train", "--pos", "rope", *counting.SHAPE, "data=text", f"data.path={text}", f"runs_dir={runs_dir}", cache
    )
    counted = counting.count(runs_dir, cache)
    assert counted["manifest_read"] == 1
    assert counted["configuration_validated"] == 2  # the command's and the run's
    assert counted["weights_hashed"] == 1
    assert counted["weights_drawn"] == 0
    assert counted["corpus_prepared"] == 1
    assert counted["encodings_built"] == 5  # one for each scaling, and the run's own
    assert counted["functions"] <= 260
    assert counted["files"] <= 50
