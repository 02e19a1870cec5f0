"""What one small `ropelab eval` under four scalings enters before its first forward pass, and what it does twice.

    python scripts/count_calls.py [RUNS_DIR]

Trains a run of two layers there first, unless it holds one (without a folder, in a temporary one). Prints one JSON
object: distinct functions of ropelab and the files they are in, up to the first forward pass of the model, its text
prepared, and how often what should happen once happened, up to the end.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import ropelab
from ropelab import cli

PACKAGE = str(Path(ropelab.__file__).parent)
SCALINGS = "[none,linear:4,ntk:4,yarn:4]"
SHAPE = (
    "model.n_layer=2", "model.d_model=16", "model.n_head=2", "train.ctx=16", "train.steps=2", "train.batch_size=2",
    "device=cpu",
)  # fmt: skip
# what is counted to the end: name in the report -> (file, function)
COUNTED = {
    "manifest_read": ("runs/folder.py", "RunDir.manifest"),
    "configuration_validated": ("config/load.py", "from_dict"),
    "weights_hashed": ("runs/folder.py", "RunDir.load_weights"),
    "weights_drawn": ("model.py", "GPT.init_weights"),
    "corpus_prepared": ("data/prepare.py", "prepare"),
    "encodings_built": ("scalings/registry.py", "build"),
}


def command(*arguments: str) -> None:
    """Run a command of ropelab in this process. `SystemExit` where it fails."""
    kept, sys.argv = sys.argv, ["ropelab", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = kept


def count(runs_dir: Path, *settings: str) -> dict[str, Any]:
    """The counts of an evaluation of the newest run in a folder."""
    calls: Counter[tuple[str, str]] = Counter()
    before: set[CodeType] = set()
    entered: set[CodeType] = set()
    started = False

    def called(frame: FrameType, event: str, _: Any) -> None:
        nonlocal before, started
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name.startswith("<") or not code.co_flags & inspect.CO_OPTIMIZED:
            return  # a lambda or a comprehension; the body of a module or a class
        calls[code.co_filename.removeprefix(f"{PACKAGE}/"), code.co_qualname] += 1
        if code.co_qualname == "GPT.forward" and not started:
            before, started = set(entered), True
        entered.add(code)

    sys.setprofile(called)
    try:
        command(
            "eval", "--ctx", "64", f"eval.scalings={SCALINGS}", "eval.tokens=2048", f"runs_dir={runs_dir}", "--json"
        )
    finally:
        sys.setprofile(None)
    assert started, "no forward pass was made: the evaluation is kept already"
    return {
        "functions": len(before),
        "files": len({code.co_filename for code in before}),
        **{name: calls[where] for name, where in COUNTED.items()},
    }


def main(runs_dir: Path) -> None:
    if not runs_dir.is_dir() or not any(runs_dir.iterdir()):
        command("train", "--pos", "rope", *SHAPE, f"runs_dir={runs_dir}")
    print(json.dumps(count(runs_dir), indent=1))


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
