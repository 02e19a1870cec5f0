"""What an evaluation needs of the model that it measures, whoever trained it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ropelab import data
from ropelab.config import Config, DataConfig, Method
from ropelab.evaluation.memory import Plan
from ropelab.evaluation.targets import Scorer
from ropelab.positions import PositionEncoding
from ropelab.progress import Progress


def check_no_bos(asked: str) -> None:
    """`ValueError` where `eval.bos` asks for a token that a run of ours does not have."""
    if asked == "true":
        raise ValueError("eval.bos=true: a run of ours was trained without a beginning-of-text token; leave it out")


class Text(NamedTuple):
    """The text that is scored."""

    split: data.Split
    digest: str  # of its corpus
    name: str
    training: data.Split | None = None  # what the model was trained on, where that is known
    bytes_known: bool = True  # do the tokeniser's byte lengths add up to the text's?
    config: DataConfig | None = None  # what names it; None: as the model's own text


class ModelAtCtx(NamedTuple):
    """A loaded model at one length."""

    spectrum: str  # sha256 of what it is told about positions
    idle: bool  # is the scaling, by its definition, without effect here?
    length_dependent: bool  # does what is said at a position depend on ctx?
    scorer: Scorer
    layers: str | None = None  # those that the scaling reaches, where it is not all
    warnings: tuple[str, ...] = ()  # what a reader of the number has to know


class LoadedModel(ABC):
    """A model on its device, with weights."""

    precision: str  # of matrix products: torch's name

    @abstractmethod
    def at(self, ctx: int, method: Method, encoding: PositionEncoding) -> ModelAtCtx:
        """The model under a scaling whose factor is a number, and the encoding that this comes to.

        `ContextLengthError` where it is undefined; `ValueError` where the scaling did not change what it should.
        """


class EvaluatedModel(ABC):
    """A trained model, before its weights are read.

    name: of its folder. results: where its evaluations are kept. manifest: as of a run. trained: its configuration.
    original_ctx: the length that scalings refer to. facts: further fields of the result. weights: their digest, as it
    was recorded and has been checked; None where there is no record. identity: further fields of the question's digest.
    own_scaling: the scaling that it is kept under, where that is not one of ours.
    """

    name: str
    results: Path
    manifest: dict[str, Any]
    trained: Config
    original_ctx: int
    tokenizer: data.Tokenizer
    facts: Mapping[str, Any] = {}
    weights: str | None = None
    identity: Mapping[str, Any] = {}
    own_scaling: Method | None = None

    def bos_token(self, asked: str) -> int | None:
        """The token that begins every window under `eval.bos`; None: none does. `ValueError` where there is none."""
        check_no_bos(asked)
        return None

    def close(self) -> None:  # noqa: B027 - a checkpoint's weights are its loaded model's
        """Let go of the weights."""

    def make_folder(self) -> None:  # noqa: B027 - a run has its folder
        """Make its folder, just before the first result is written."""

    @abstractmethod
    def text(self, other: DataConfig | None, which: str, cache_dir: str, progress: Progress) -> Text:
        """The split `which` of its own text, or other text."""

    @abstractmethod
    def plan(
        self,
        encodings: Mapping[int, PositionEncoding],
        device: torch.device,
        dtype: torch.dtype,
        *,
        limit_gb: float | None,
    ) -> Plan:
        """The passes of an evaluation at these lengths; `ValueError` where one does not fit."""

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype, *, window: int | None, kept: bool) -> LoadedModel:
        """The model on its device. `kept`: it is evaluated under the scaling that it was trained with."""
