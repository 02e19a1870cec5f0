"""A checkpoint of transformers: found, refused where it cannot be evaluated or trusted, and loaded."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ropelab import data, files
from ropelab.experiment.devices import DTYPE_NAMES
from ropelab.huggingface import rotary
from ropelab.runs import is_run

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "pos_emb")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings: what matters is checked, and said in our words."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def find(name: str) -> Path:
    """The folder of a checkpoint: a local one, or one of the hub, whose files are fetched without any code.

    `ValueError` in one line for a folder without configuration or safetensors, and for what the hub does not have.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise ValueError(f"{name} does not exist; give a folder with config.json, or a model's name on the hub")
        folder = _fetched(name)
    if is_run(folder) and not (folder / "config.json").is_file():
        raise ValueError(f"{name} is a run of ropelab: leave out --hf")
    if not folder.is_dir():
        raise ValueError(f"{name} is a file; give the folder that holds config.json and {WEIGHTS}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json: it is no checkpoint of transformers")
    if not weight_files(folder):
        pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{name} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; write it as "
                "safetensors once, on a machine that trusts it: model.save_pretrained(FOLDER)"
            )
        raise ValueError(f"{name} has no weights: {WEIGHTS} is missing")
    return folder


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # whatever goes wrong in there is the network's, the hub's or the name's
        raise ValueError(
            f"{name} is no folder here, and the hub does not give it ({type(error).__name__}); check the name and the "
            "network, or give a folder"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint; none where there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = files.read_json(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if isinstance(index, dict) and "weight_map" in index else []
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is incomplete: {INDEX} names {missing[0]}, which is not there")
    return [folder / name for name in names]


def digest(folder: Path) -> str:
    """sha256 over configuration and weights."""
    hasher = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        hasher.update(f"{path.name} {files.sha256_of(path)}\n".encode())
    return hasher.hexdigest()


def read_config(folder: Path) -> Any:
    """The configuration of a causal language model. `ValueError` for an encoder, and for a model with its own code."""
    raw = files.read_json(folder / "config.json")
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(f"{folder / 'config.json'} is no configuration of transformers: it names no model_type")
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        own = "comes with its own code, which is never run" if raw.get("auto_map") else "is not a model that it knows"
        raise ValueError(f"{folder}: model_type '{kind}' {own} (transformers {transformers.__version__})")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a wrong value raises whatever the configuration's class raises
        raise ValueError(f"{folder / 'config.json'} is refused by transformers ({_line(error)})") from None
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    built = raw.get("architectures") or []
    if getattr(config, "is_encoder_decoder", False) or not known or not all(_causal(config, name) for name in built):
        what = built[0] if built else kind
        raise ValueError(f"{folder} is {what}, no causal language model: there is no next token to score")
    return config


def _causal(config: Any, architecture: str) -> bool:
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = [one.__name__ for one in (classes if isinstance(classes, tuple | list) else (classes,))]
    return architecture in names or architecture.endswith("ForConditionalGeneration")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def skeleton(config: Any) -> nn.Module:
    """The model without memory for its weights, to see what it is made of."""
    try:
        with quiet(), torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # a value that the model's class does not know
        version = f"transformers {transformers.__version__}"
        kinds = [one.get("rope_type") for one in rotary.declared(config).values()]
        if isinstance(error, KeyError) and error.args[0] in kinds:
            raise ValueError(f"{version} does not know the rope_type '{error.args[0]}' of config.json") from None
        raise ValueError(f"{version} cannot build this model ({_line(error)})") from None
    return model


def load(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model with its weights on the CPU, ready to be evaluated.

    `ValueError` for weights that do not fit the configuration, and for a model that attends to later tokens.
    """
    try:
        with quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, config=copy.deepcopy(config), dtype=dtype, use_safetensors=True, trust_remote_code=False,
                local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # damaged files, wrong shapes: each library has its own class
        raise ValueError(f"{folder} cannot be loaded ({_line(error)})") from None
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        if info.get(key):
            names = sorted(str(name if isinstance(name, str) else name[0]) for name in info[key])
            raise ValueError(f"the checkpoint {folder} {what} {names[0]}, which {type(model).__name__} needs")
    model.eval()
    _check_causal(model, folder, DTYPE_NAMES[dtype])
    return model


@torch.no_grad()
def _check_causal(model: Any, folder: Path, dtype: str) -> None:
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size  # (1, T)
    other = ids.clone()
    other[0, -1] = 0
    one, two = (model(input_ids=tokens, use_cache=False).logits[0, :-1].float() for tokens in (ids, other))
    if not (torch.isfinite(one).all() and torch.isfinite(two).all()):
        raise ValueError(
            f"{folder} gives numbers that are not finite: its weights are damaged, or too large for {dtype}"
        )
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        raise ValueError(f"{folder} attends to later tokens: it is an encoder, and has no next token to score")


def longest_trained(config: Any) -> int | None:
    """The length that a configuration says the model is made for."""
    text = config.get_text_config()
    found = next((getattr(text, key, None) for key in LENGTHS if getattr(text, key, None)), None)
    return None if found is None else int(found)


def table_rows(model: nn.Module, config: Any) -> int | None:
    """The longest text that a model without rotation can read: rows of its position table; None: there is none."""
    text = config.get_text_config()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITION_TABLES:
            return module.num_embeddings - int(getattr(module, "offset", 0))
    # positions that are neither rotary nor ALiBi nor such a table end where the configuration says
    return getattr(text, "max_position_embeddings", None)


def read_tokenizer(folder: Path, rows: int) -> data.Tokenizer:
    """The checkpoint's tokeniser, ours where it is one. `ValueError` where there is none, or it has other tokens."""
    source = files.read_json(folder / "tokenizer.json")
    if not isinstance(source, dict):
        try:
            with quiet():
                found = transformers.AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True
                )
            source = json.loads(found.backend_tokenizer.to_str())
            if not found("a text")["input_ids"]:  # some classes make an empty one of nothing
                raise ValueError("no vocabulary")
        except Exception as error:  # each tokeniser fails in its own way without its files
            raise ValueError(
                f"{folder} has no tokenizer.json, and none can be made of its files ({type(error).__name__}); write "
                "one with AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
            ) from None
    return data.from_json(source, rows)


def slug(name: str) -> str:
    """A name as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "_", Path(name).name).strip("_")[:40] or "checkpoint"


class Head:
    """Forward passes of a causal language model whose head runs on as many positions as it is asked for.

    The model's own forward is what runs, so that whatever it does after its last layer (a bias, a cap, a factor on the
    logits) is done here too; only the hidden states that it is given are cut.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._body = _body_of(model)

    @contextmanager
    def _body_is(self, forward: Callable[..., Any]) -> Iterator[None]:
        before = self._body.__dict__.get("forward")
        self._body.forward = forward
        try:
            yield
        finally:
            del self._body.forward
            if before is not None:
                self._body.forward = before

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> what the head reads, (B, T, C)."""
        original = self._body.forward
        kept: list[Any] = []

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            kept.append(out)
            return _with_hidden(out, out.last_hidden_state[:, -1:])

        with self._body_is(forward):
            self.model(input_ids=ids, use_cache=False, return_dict=True)
        self._out = kept[0]
        hidden: Tensor = self._out.last_hidden_state
        self._out = _with_hidden(self._out, hidden[:, :0])
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, C), of the pass before -> logits (N, V) fp32."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _with_hidden(self._out, hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with self._body_is(forward):
            out: Tensor = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
        return out[0].float()


def _body_of(model: Any) -> nn.Module:
    """The module whose last hidden states the head reads: the outermost of those that a pass calls."""
    base = getattr(model, model.base_model_prefix, None)
    candidates = [one for one in (base, getattr(base, "decoder", None), model.get_decoder()) if one is not None]
    called: list[nn.Module] = []
    hooks = [one.register_forward_hook(lambda module, args, out: called.append(module)) for one in candidates]
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    found: nn.Module | None = next((one for one in candidates if one in called), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} is built in a way that ropelab does not know: its body is not called")
    return found


def _with_hidden(out: Any, hidden: Tensor) -> Any:
    """A model's output with other last hidden states."""
    return type(out)(**{**out, "last_hidden_state": hidden})
