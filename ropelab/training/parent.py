"""The finished run that a training starts from."""

from __future__ import annotations

from pathlib import Path

from ropelab import runs
from ropelab.config import Config
from ropelab.positions import PositionEncoding
from ropelab.runs import OpenRun


def open_parent(config: Config) -> OpenRun | None:
    """The run that `config.parent` names; None without one.

    `ValueError` when it is not finished, or when its model or tokeniser is not the configuration's.
    """
    if config.parent is None:
        return None
    parent = runs.open_run(runs.find_run(config.parent, Path(config.runs_dir).expanduser()))
    parent.weights  # noqa: B018 - damaged ones are refused first
    theirs = parent.config
    for key in ("n_layer", "d_model", "n_head", "qk_norm"):
        mine, its = getattr(config.model, key), getattr(theirs.model, key)
        if mine != its:
            raise ValueError(f"model.{key}={mine} differs from that of the parent {parent.name}, {its}; leave it out")
    for key in ("tokenizer", "vocab_size"):
        mine, its = getattr(config.data, key), getattr(theirs.data, key)
        if mine != its and (key == "tokenizer" or theirs.data.tokenizer == "bpe"):
            raise ValueError(f"data.{key}={mine} differs from that of the parent {parent.name}, {its}; leave it out")
    if theirs.pos.name == config.pos.name == "drope" and config.pos.parameters["drop_after"] != 0:
        raise ValueError(f"the rotation of {parent.name} is dropped already; add pos.drop_after=0")
    return parent


def steps_behind(parent: OpenRun) -> int:
    """Steps of a parent and all its ancestors: the child's batches come after theirs."""
    return int(parent.manifest.get("first_step", 0)) + parent.config.train.steps


def check_weights(encoding: PositionEncoding, parent: OpenRun) -> None:
    """`ValueError` where an encoding has other weights than a parent's, so that training cannot resume from these."""
    its = {name.removeprefix("encoding."): w for name, w in parent.weights.items() if name.startswith("encoding.")}
    mine = encoding.state_dict()
    odd = [n for n in sorted({*mine, *its}) if n not in mine or n not in its or mine[n].shape != its[n].shape]
    if odd:
        raise ValueError(
            f"{parent.name} cannot be gone on from: its position weights are others ({', '.join(odd[:3])})"
        )
