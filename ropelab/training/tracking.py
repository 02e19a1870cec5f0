"""An echo of metrics.jsonl to Weights & Biases: the only module that imports wandb, and only when it is switched on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropelab.config import TrackConfig
from ropelab.progress import tell


class Tracker:
    """Echoes metric lines to wandb; does nothing when `track.wandb=disabled`.

    `ValueError` when wandb cannot be started. Once it has been, a failure of the echo is reported on stderr and never
    ends the training: metrics.jsonl is the record.
    """

    def __init__(self, config: TrackConfig, *, name: str, run_id: str, folder: Path, facts: Mapping[str, Any]) -> None:
        self._run: Any = None
        if config.wandb == "disabled":
            return
        import wandb

        try:
            self._run = wandb.init(
                project=config.project,
                name=name,
                id=run_id,  # a resumed run continues the same wandb run
                resume="allow",
                dir=str(folder),
                mode="offline" if config.wandb == "offline" else "online",
                config=dict(facts),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            raise ValueError(f"track.wandb={config.wandb}: {error}; or use track.wandb=offline") from None

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])
        except Exception as error:  # whatever goes wrong in there
            self._give_up(error)

    def finish(self, *, failed: bool = False) -> None:
        """Close the wandb run, as failed or as finished."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        tell(f"wandb failed ({type(error).__name__}: {error}); metrics.jsonl has it all")
        self._run = None
