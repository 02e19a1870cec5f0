"""Trained models and their folders: what addresses a run, what its folder holds, and how it is found."""

from ropelab.runs.evaluation import wrong_evaluation
from ropelab.runs.finding import SWEEPS, all_runs, find_run, is_run, latest_finished, open_runs_dir
from ropelab.runs.folder import RunBusyError, RunDir, RunError, checkpoint_state, load_tensors
from ropelab.runs.identity import NUMERICS_VERSION, identity, recipe, run_name

__all__ = [
    "NUMERICS_VERSION",
    "SWEEPS",
    "RunBusyError",
    "RunDir",
    "RunError",
    "all_runs",
    "checkpoint_state",
    "find_run",
    "identity",
    "is_run",
    "latest_finished",
    "load_tensors",
    "open_runs_dir",
    "recipe",
    "run_name",
    "wrong_evaluation",
]
