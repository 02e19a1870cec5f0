"""A finished run, opened once: everything that its folder says is read and checked here, at most once each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropelab import config as configs
from ropelab import data
from ropelab.config import Config, Method
from ropelab.errors import RunError
from ropelab.progress import Progress, silent
from ropelab.runs.folder import RunDir, made_by

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ropelab.model import GPT
    from ropelab.positions import PositionEncoding

MOST = 2**20  # layers, heads, dimensions of a stored model


def open_run(run: RunDir | OpenRun | Path | str, *, finished: bool = True) -> OpenRun:
    """The run in a folder, its manifest read and verified; one that is open already stays as it is.

    `RunError` where it is no run or altered, and, unless `finished` is False, where it is not finished.
    """
    if isinstance(run, OpenRun):
        return run
    folder = run if isinstance(run, RunDir) else RunDir(Path(run).expanduser())
    return OpenRun(folder, folder.finished_manifest() if finished else folder.whole_manifest())


class OpenRun:
    """One run and what its folder holds. Each part is read when it is first asked for, checked, and kept.

    folder: where it is. manifest: as it was read when the run was opened.
    """

    def __init__(self, folder: RunDir, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._corpora: dict[Path, data.Corpus] = {}
        self._models: dict[torch.device, tuple[GPT, PositionEncoding]] = {}  # with the encoding it was trained with

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def original_ctx(self) -> int:
        """The length that every scaling refers to: train.ctx from scratch, the root parent's after fine-tuning."""
        return int(self.manifest["original_ctx"])

    @functools.cached_property
    def config(self) -> Config:
        """The configuration that it was trained with. `RunError` as `config_of`."""
        return config_of(self.manifest, self.folder)

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """Its own. `RunError` where the file is damaged, or not the one that the run was trained with."""
        fix = "restore it, or train with the run's settings again, which writes it anew"
        path = self.folder.tokenizer_path
        try:
            tokenizer = data.load_tokenizer(path)
        except ValueError as error:
            raise RunError(f"{error}; {fix}") from None
        known = self.manifest.get("tokenizer", {})
        if (tokenizer.digest, tokenizer.n_vocab) != (known.get("digest"), known.get("n_vocab")):
            raise RunError(f"{path} is not the tokeniser that {self.name} was trained with; {fix}")
        return tokenizer

    @functools.cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Its tensors by name. `RunError` where the checkpoint is damaged."""
        return self.folder.load_weights(self.manifest)

    @functools.cached_property
    def weights_digest(self) -> str | None:
        """sha256 of the weights as the checkpoint recorded it; None where there is no such record."""
        return self.folder.weights_digest(self.manifest)

    def corpus(self, cache_dir: str, progress: Progress = silent) -> data.Corpus:
        """The text that it was trained on, in its tokens. `RunError` where that text has changed since."""
        cache = Path(cache_dir).expanduser()
        if cache not in self._corpora:
            trained = self.config.data
            corpus = data.prepare(trained, cache_dir=cache, tokenizer=self.tokenizer, progress=progress)
            if corpus.digest != self.manifest["corpus"]["digest"]:
                raise RunError(
                    f"the text of data={trained.name} is not the one that {self.name} was trained on; restore it"
                )
            self._corpora[cache] = corpus
        return self._corpora[cache]

    def encoding(self, scaling: Method) -> PositionEncoding:
        """The encoding under a scaling with a resolved factor, without its trained tensors. `ValueError` as `build`."""
        from ropelab.runs.models import encoding_of

        return encoding_of(self.config, scaling, self.original_ctx)

    def model(self, device: torch.device) -> GPT:
        """Its model without a scaling, ready to be evaluated: one on each device, whatever encoding it got before."""
        from ropelab.runs.models import restored_model

        if device not in self._models:
            n_vocab = self.manifest["tokenizer"]["n_vocab"]
            try:
                model = restored_model(
                    self.config, n_vocab, self.weights, original_ctx=self.original_ctx, device=device
                )
            except ValueError as error:
                raise RunError(
                    f"{self.folder.manifest_path} tells of another model than the weights of {self.name} ({error}); "
                    "restore the run, or train it again"
                ) from None
            self._models[device] = model, model.encoding
        model, model.encoding = self._models[device]
        return model

    def close(self) -> None:
        """Let go of the weights and the models."""
        self._models.clear()
        self.__dict__.pop("weights", None)


def config_of(manifest: Mapping[str, Any], folder: RunDir) -> Config:
    """The configuration in a manifest. `RunError`, with the version that wrote it, where this one cannot read it.

    It is plain JSON into dataclasses: nothing in it is expanded, and no name in it is imported.
    """
    try:
        config = configs.from_dict(manifest.get("config", {}))
        for key in ("n_layer", "d_model", "n_head"):  # before anything of these sizes is made
            if getattr(config.model, key) > MOST:
                raise ValueError(f"model.{key} is more than {MOST}")
        return config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder.manifest_path}: {error}; it is of {made_by(manifest)}, or train the run again"
        ) from None


def run_tokenizer(run: RunDir) -> data.Tokenizer:
    """The tokeniser of a run that may be unfinished. `RunError` as `OpenRun.tokenizer`."""
    return OpenRun(run, run.manifest()).tokenizer
