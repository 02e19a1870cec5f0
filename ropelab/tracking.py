"""An echo of metrics.jsonl to Weights & Biases: the only module that imports wandb, and only when it is switched on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropelab.schema import TrackConfig


class Tracker:
    """Echoes metric lines to wandb; does nothing when `track.wandb=disabled`."""

    def __init__(self, config: TrackConfig, *, name: str, run_id: str, folder: Path, facts: Mapping[str, Any]) -> None:
        self._run: Any = None
        if config.wandb == "disabled":
            return
        import wandb

        self._run = wandb.init(
            project=config.project,
            name=name,
            id=run_id,  # a resumed run goes on in the same wandb run
            resume="allow",
            dir=str(folder),
            mode="offline" if config.wandb == "offline" else "online",
            config=dict(facts),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._run is not None:
            self._run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def finish(self, *, failed: bool = False) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None
