"""What a run folder says of how it was trained, checked against what it says of itself: it may be a stranger's."""

from __future__ import annotations

from ropelab import config as configs
from ropelab import data
from ropelab.runs import RunDir, RunError, made_by
from ropelab.schema import Config

MOST = 2**20  # layers, heads, dimensions of a stored model


def trained_config(run: RunDir) -> Config:
    """The configuration in a run's manifest. `RunError`, with the version that wrote it, where this one cannot read it.

    It is plain JSON into dataclasses: nothing in it is expanded, and no name in it is imported.
    """
    manifest = run.manifest()
    try:
        config = configs.from_dict(manifest.get("config", {}))
        for key in ("n_layer", "d_model", "n_head"):  # before anything of these sizes is made
            if getattr(config.model, key) > MOST:
                raise ValueError(f"model.{key} is more than {MOST}")
        return config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{run.manifest_path}: {error}; it is of {made_by(manifest)}, or train the run again") from None


def run_tokenizer(run: RunDir) -> data.Tokenizer:
    """The run's own tokeniser. `RunError` where the file is damaged, or not the one that the run was trained with."""
    fix = "restore it, or train with the run's settings again, which writes it anew"
    try:
        tokenizer = data.load_tokenizer(run.tokenizer_path)
    except ValueError as error:
        raise RunError(f"{error}; {fix}") from None
    said = run.manifest().get("tokenizer", {})
    if (tokenizer.digest, tokenizer.n_vocab) != (said.get("digest"), said.get("n_vocab")):
        raise RunError(f"{run.tokenizer_path} is not the tokeniser that {run.name} was trained with; {fix}")
    return tokenizer
