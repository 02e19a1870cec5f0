"""Trained models and their folders: what addresses a run, what its folder holds, and how it is found."""

from ropelab.runs.evaluation import wrong_evaluation
from ropelab.runs.finding import SWEEPS, all_runs, check_runs_dir, find_run, is_run, latest_finished
from ropelab.runs.folder import RunBusyError, RunDir, RunError, checkpoint_state, load_tensors, made_by, save_tensors
from ropelab.runs.identity import NUMERICS_VERSION, identity, recipe, run_name

__all__ = [
    "NUMERICS_VERSION",
    "SWEEPS",
    "RunBusyError",
    "RunDir",
    "RunError",
    "all_runs",
    "check_runs_dir",
    "checkpoint_state",
    "find_run",
    "identity",
    "is_run",
    "latest_finished",
    "load_tensors",
    "made_by",
    "recipe",
    "run_name",
    "save_tensors",
    "wrong_evaluation",
]
