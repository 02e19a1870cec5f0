"""The finished run that a training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ropelab import data, runs
from ropelab.config import Config
from ropelab.positions import PositionEncoding
from ropelab.runs import RunDir, run_tokenizer, trained_config


class Parent(NamedTuple):
    """The finished run that a training starts from."""

    run: RunDir
    original_ctx: int  # of its root
    steps: int  # of it and all its ancestors: the child's batches come after theirs
    tokenizer: data.Tokenizer


def find_parent(config: Config) -> Parent | None:
    """The run that `config.parent` names; None without one.

    `ValueError` when it is not finished, or when its model or tokeniser is not the configuration's.
    """
    if config.parent is None:
        return None
    run = runs.find_run(config.parent, Path(config.runs_dir).expanduser())
    run.load_weights()
    manifest = run.finished_manifest()
    theirs = trained_config(run)
    for key in ("n_layer", "d_model", "n_head", "qk_norm"):
        mine, its = getattr(config.model, key), getattr(theirs.model, key)
        if mine != its:
            raise ValueError(f"model.{key}={mine} differs from that of the parent {run.name}, {its}; leave it out")
    for key in ("tokenizer", "vocab_size"):
        mine, its = getattr(config.data, key), getattr(theirs.data, key)
        if mine != its and (key == "tokenizer" or theirs.data.tokenizer == "bpe"):
            raise ValueError(f"data.{key}={mine} differs from that of the parent {run.name}, {its}; leave it out")
    if theirs.pos.name == config.pos.name == "drope" and config.pos.parameters["drop_after"] != 0:
        raise ValueError(f"the rotation of {run.name} is dropped already; add pos.drop_after=0")
    steps = manifest.get("first_step", 0) + theirs.train.steps
    return Parent(run, manifest["original_ctx"], steps, run_tokenizer(run))


def check_weights(encoding: PositionEncoding, parent: RunDir) -> None:
    """`ValueError` where an encoding has other weights than a parent's, so that these cannot be gone on from."""
    its = {
        name.removeprefix("encoding."): w for name, w in parent.load_weights().items() if name.startswith("encoding.")
    }
    mine = encoding.state_dict()
    odd = [n for n in sorted({*mine, *its}) if n not in mine or n not in its or mine[n].shape != its[n].shape]
    if odd:
        raise ValueError(
            f"{parent.name} cannot be gone on from: its position weights are others ({', '.join(odd[:3])})"
        )
