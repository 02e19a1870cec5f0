"""The shape of a configuration: plain frozen dataclasses, validated on construction, free of torch and of Hydra.

Values live in `configs/` (every default once, with a comment); this module says what kinds of value are legal.
A range that a user can violate raises `ValueError` with the dotted key in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ropelab.protocols import PROTOCOLS

DTYPES = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")
PARALLEL = ("auto", "ddp", "fsdp")
BASELINES = ("unigram",)
BOS = ("false", "true", "auto")
WANDB_MODES = ("disabled", "offline", "online")
CORPORA = ("stdlib", "text", "hf", "books", "nonfiction", "wikitext")
TOKENIZERS = ("bytes", "bpe", "gpt2")
OVERLAPS = ("refuse", "warn", "drop")
HEADS = ("keep", "drop")
SPLIT_BY = ("document", "file")
FIRST_ENDINGS = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz")  # what the first versions read


def _positive(key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} must be > 0, not {value}")


def _at_least(key: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{key} must be >= {low:g}, not {value}")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, not '{value}'")


@dataclass(frozen=True)
class Method:
    """A named method of a group (`pos`, `scaling`, `positions`) with its own parameters, as its YAML spells them.

    The YAML fixes names and types of the parameters; the method itself checks their ranges when it is built.
    """

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    name: str
    n_layer: int
    d_model: int
    n_head: int
    qk_norm: bool

    def __post_init__(self) -> None:
        for key in ("n_layer", "d_model", "n_head"):
            _at_least(f"model.{key}", getattr(self, key), 1)
        if self.d_model % self.n_head:
            raise ValueError(
                f"model.d_model must be divisible by model.n_head, not {self.d_model} by {self.n_head}; "
                f"try model.n_head={math.gcd(self.d_model, 4)}"
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


@dataclass(frozen=True)
class SplitNames:
    """What the splits of a corpus are called there; None: by the usual names."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in (self.train, self.validation, self.test) if name is not None]
        twice = next((name for name in given if given.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"data.splits.* names '{twice}' twice; a text is in one split")


@dataclass(frozen=True)
class DataConfig:
    name: str  # one of CORPORA
    path: str | None  # file or folder (text, hf, presets), or a hub name (hf)
    subset: str | None  # configuration of a hub dataset (hf only)
    tokenizer: str  # one of TOKENIZERS
    vocab_size: int  # bpe: entries, the separator included
    tokenizer_path: str | None  # gpt2: folder with encoder.json and vocab.bpe (or vocab.json and merges.txt)
    text_field: str  # field of a row that holds the text; `document.text` is one inside another
    splits: SplitNames = SplitNames()
    test_path: str | None = None  # own test files (text, hf)
    held_out: float = 0.05  # share of the text for each split that is made
    split_by: str = "document"  # one of SPLIT_BY
    endings: tuple[str, ...] | None = None  # which files of a folder are read (text); None: those that are known
    overlap: str = "refuse"  # one of OVERLAPS
    repeated_heads: str = "keep"  # one of HEADS

    def __post_init__(self) -> None:
        _one_of("data.name", self.name, CORPORA)
        _one_of("data.tokenizer", self.tokenizer, TOKENIZERS)
        if self.tokenizer == "bpe" and not 258 <= self.vocab_size <= 2**16:
            raise ValueError(f"data.vocab_size must be between 258 and 65536, not {self.vocab_size}")
        if not self.text_field:
            raise ValueError("data.text_field must not be empty")
        if self.name == "stdlib" and self.path:
            raise ValueError(f"data=stdlib reads no data.path={self.path}; add data=text")
        if self.name in ("text", "hf") and not self.path:
            raise ValueError(f"data={self.name} needs data.path=FILE_OR_FOLDER")
        if not 0 < self.held_out <= 0.4:
            raise ValueError(f"data.held_out must be above 0 and at most 0.4, not {self.held_out}")
        _one_of("data.split_by", self.split_by, SPLIT_BY)
        _one_of("data.overlap", self.overlap, OVERLAPS)
        _one_of("data.repeated_heads", self.repeated_heads, HEADS)
        for ending in self.endings or ():
            if not (ending.startswith(".") and len(ending) > 1):
                raise ValueError(f"data.endings holds endings of file names such as .txt, not '{ending}'")
        if self.endings == ():
            raise ValueError("data.endings=[] reads no file; give endings such as [.txt], or null")
        own = self.name in ("text", "hf")  # the others say themselves what they are made of
        choices = {
            "test_path": self.test_path is None or own,
            "held_out": self.held_out == 0.05 or own,
            "splits.*": self.splits == SplitNames() or own,
            "overlap": self.overlap == "refuse" or self.name != "stdlib",
            "repeated_heads": self.repeated_heads == "keep" or own,
            "split_by": self.split_by == "document" or self.name == "text",
            "endings": self.endings in (None, FIRST_ENDINGS) or self.name == "text",
        }
        for key, fits in choices.items():
            if not fits:
                raise ValueError(f"data={self.name} knows no data.{key}: leave it out, or add data=text")


@dataclass(frozen=True)
class TrainConfig:
    ctx: int
    batch_size: int  # sequences per step
    micro_batch_size: int | None  # sequences per forward pass of a rank; null: its whole share at once
    steps: int
    lr: float  # peak learning rate
    final_lr: float  # the cosine ends at this fraction of lr
    warmup_steps: int | None  # null: 5% of steps
    weight_decay: float
    grad_clip: float | None  # largest global gradient norm; null: no clipping
    dtype: str
    compile: bool | None  # torch.compile of each block; null: on CUDA
    deterministic: bool  # only kernels that give the same bits each time
    activation_checkpointing: bool  # keep each block's input alone and compute the rest again in the backward pass
    eval_every: int  # steps between validation losses
    checkpoint_every: int  # steps between checkpoints
    keep: tuple[float, ...]  # fractions of the training at which weights are kept
    parallel: str = "ddp"  # over several devices: one of PARALLEL

    def __post_init__(self) -> None:
        _at_least("train.ctx", self.ctx, 2)
        for key in ("batch_size", "steps", "eval_every", "checkpoint_every"):
            _at_least(f"train.{key}", getattr(self, key), 1)
        _positive("train.lr", self.lr)
        _at_least("train.weight_decay", self.weight_decay, 0)
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"train.final_lr must be in [0, 1], not {self.final_lr}")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"train.warmup_steps must be in [0, train.steps={self.steps}], not {self.warmup_steps}")
        if self.grad_clip is not None:
            _positive("train.grad_clip", self.grad_clip)
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"train.micro_batch_size must divide train.batch_size={self.batch_size}, not {self.micro_batch_size}"
            )
        _one_of("train.dtype", self.dtype, DTYPES)
        _one_of("train.parallel", self.parallel, PARALLEL)
        for fraction in self.keep:
            if not 0 < fraction < 1:
                raise ValueError(f"train.keep holds fractions between 0 and 1, not {fraction}")

    @property
    def warmup(self) -> int:
        """Warm-up steps: as given, or 5% of all steps."""
        return round(0.05 * self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def micro(self) -> int:
        """Sequences in one forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


@dataclass(frozen=True)
class EvalConfig:
    ctx: str | None  # "8192" the ladder, "512,8192" exactly that; null: the ladder up to 8 x train_ctx
    protocol: str
    stride: int  # sliding: targets per window
    last: int  # last: targets per window
    tokens: int  # budget of spanned targets, shared equally by the documents
    max_ctx: int | None  # span laid out for this ctx, so that two ladders score the same targets
    window: int | None  # attention window control: keep keys with 0 <= i - j < window
    baseline: str | None  # unigram: score the targets by the training text's token frequencies instead of the model
    bos: str  # does a checkpoint's beginning-of-text token begin every window? auto: as its tokeniser does
    scalings: tuple[str, ...]  # `name` or `name:factor`; empty: --scaling, or the trained one
    dtype: str
    memory_gb: float | None  # memory that a pass may take beside the weights, in 10**9 bytes; null: what is free
    split: str  # test | validation (for choices that must not see the test text)

    def __post_init__(self) -> None:
        _one_of("eval.split", self.split, ("test", "validation"))
        _one_of("eval.protocol", self.protocol, tuple(PROTOCOLS))
        for key in ("stride", "last", "tokens"):
            _at_least(f"eval.{key}", getattr(self, key), 1)
        if self.baseline is not None:
            _one_of("eval.baseline", self.baseline, BASELINES)
        _one_of("eval.bos", self.bos, BOS)
        for key in ("max_ctx", "window"):
            value = getattr(self, key)
            if value is not None:
                _at_least(f"eval.{key}", value, 1)
        _one_of("eval.dtype", self.dtype, DTYPES)
        if self.memory_gb is not None:
            _positive("eval.memory_gb", self.memory_gb)


@dataclass(frozen=True)
class TrackConfig:
    wandb: str
    project: str

    def __post_init__(self) -> None:
        _one_of("track.wandb", self.wandb, WANDB_MODES)
        if not self.project:
            raise ValueError("track.project must not be empty")


@dataclass(frozen=True)
class LocalLauncher:
    """How a sweep runs on this machine: the values of `configs/launcher/local.yaml`."""

    jobs: int | None  # runs at once; null: one a GPU, or one a core
    stack: int  # runs of one shape and recipe that are trained in one batched step

    def __post_init__(self) -> None:
        for key in ("jobs", "stack"):
            value = getattr(self, key)
            if value is not None:
                _at_least(f"launcher.{key}", value, 1)


@dataclass(frozen=True)
class SlurmLauncher:
    """How a sweep runs on a Slurm cluster: the values of `configs/launcher/slurm.yaml`, where each is explained."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    time_min: int
    mem_gb: float
    cpus: int
    gpus: int
    nodes: int
    tasks_per_node: int
    array_parallelism: int
    signal_delay_s: int
    max_requeues: int
    setup: tuple[str, ...]
    sbatch: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value < 2**31:
                raise ValueError(f"launcher.{field.name} must be < 2**31")
        for key in ("time_min", "cpus", "nodes", "tasks_per_node", "array_parallelism"):
            _at_least(f"launcher.{key}", getattr(self, key), 1)
        for key in ("gpus", "signal_delay_s", "max_requeues"):
            _at_least(f"launcher.{key}", getattr(self, key), 0)
        _positive("launcher.mem_gb", self.mem_gb)
        if self.gpus and self.gpus % self.tasks_per_node:
            raise ValueError(
                f"launcher.gpus={self.gpus} cannot be shared by launcher.tasks_per_node={self.tasks_per_node} ranks; "
                "give each rank one GPU"
            )
        # each is a comment line of a batch script: after a line's end it would be a command
        for text in (self.partition, self.account, self.qos, self.constraint, *self.sbatch):
            if text is not None and not text.isprintable():
                raise ValueError(f"launcher settings are printable text in one line, not {text!r}")
        for item in self.sbatch:
            if not item.partition("=")[0].strip("-"):
                raise ValueError(f"launcher.sbatch takes key=value or a flag's name, not '{item}'")


@dataclass(frozen=True)
class Config:
    """One experiment, resolved: what `configs/` and the command line's overrides come to."""

    pos: Method
    scaling: Method
    positions: Method
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    track: TrackConfig
    parent: str | None  # the run whose weights the training starts from
    seed: int
    device: str
    runs_dir: str
    cache_dir: str

    def __post_init__(self) -> None:
        _one_of("device", self.device.partition(":")[0], DEVICES)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), not {self.seed}")
