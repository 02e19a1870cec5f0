"""A checkpoint of transformers: found, refused where it cannot be evaluated or trusted, and loaded."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ropelab import data, files
from ropelab.devices import DTYPE_NAMES
from ropelab.errors import DamagedFileError
from ropelab.huggingface import adapter, rotary
from ropelab.runs import is_run

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MADE = 2**28  # elements and bytes of buffers that a model may have beside its weights: masks, tables of angles
JSON_LIMIT = 2**28  # bytes of a JSON file: a vocabulary, or an index of many files
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "pos_emb")
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# other counts of layers, of which a configuration's class builds lists; attention_types is GPT-Neo's
OF_LAYERS = re.compile(r".*layers?|.*_replace|attention_types")
MOST_LAYERS = 2**16
NAMED_WEIGHTS = "transformers_weights"  # of config.json: the name of the file that holds the weights
# of config.json: other files to read, other code to run, and the labels of a classifier, of which a list is built
LEADING_AWAY = (
    NAMED_WEIGHTS, "configuration_files", "auto_map", "fusion_config", "_attn_implementation", "attn_implementation",
    "_experts_implementation", "experts_implementation", "distributed_config", "kernel_config", "use_kernels",
    "num_labels", "id2label", "label2id",
)  # fmt: skip
OF_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
BESIDE_VOCABULARIES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONVERTING_SECONDS = 300  # of work, to make a tokenizer.json of other files
_CONVERTED = """
try:
    found = transformers.AutoTokenizer.from_pretrained(given["place"], trust_remote_code=False, local_files_only=True)
    source = found.backend_tokenizer.to_str()
    if not found("a text")["input_ids"]:  # some classes make an empty one of nothing
        raise ValueError("no vocabulary")
except Exception as error:
    print(type(error).__name__)
    sys.exit(4)
with open(given["to"], "w", encoding="utf-8") as file:
    file.write(source)
"""


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
    if own_file(folder, "config.json") is None:
        if own_file(folder, adapter.CONFIG) is not None:
            raise ValueError(f"{name} is an adapter; give the model that it is for: --hf MODEL --adapter {name}")
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


# --- files ------------------------------------------------------------------------------------------------------------


def own_file(folder: Path, name: str) -> Path | None:
    """A regular file of a checkpoint's folder; None where there is none of that name.

    `ValueError` for a name that is a path, and for a link that leads out of the folder. The files of a hub snapshot are
    links into the blobs of the same repository's cache: these are followed.
    """
    if Path(name).name != name:
        raise ValueError(f"{folder} names '{name}' as a file; only plain names of files in the folder are read")
    path = folder / name
    if not path.is_file():
        return None
    real, root = path.resolve(), folder.resolve()
    cached = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    if not cached and not real.is_relative_to(root):
        raise ValueError(f"{path} is a link out of its folder, which is not followed; put the file itself there")
    return path


def read_json(path: Path) -> Any:
    """The value in a JSON file of a checkpoint, which may be a link into its cache; None where there is none.

    Configurations of transformers have infinite numbers in them.
    """
    return files.read_json(path, limit=JSON_LIMIT, follow=True, finite=False)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, each once; none where there are none."""
    named, placed = _weights(folder)
    return named if placed is None else [folder / name for name in sorted(set(placed.values()))]


def _weights(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The one file of weights, or none and, of several files, which tensor lies in which."""
    raw = read_json(folder / "config.json")
    first = raw.get(NAMED_WEIGHTS) if isinstance(raw, dict) else None
    if first is not None and not (
        isinstance(first, str) and first.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ValueError(f"{folder / 'config.json'}: {NAMED_WEIGHTS} is not the name of a safetensors file")
    if first is None and own_file(folder, WEIGHTS) is not None:
        first = WEIGHTS
    if first is not None and not first.endswith(".json"):
        found = own_file(folder, first)
        if found is None:
            raise ValueError(f"{folder} is incomplete: config.json names {first}, which is not there")
        return [found], None
    name = first or INDEX
    index = read_json(folder / name) if own_file(folder, name) is not None else None
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if placed is None:
        return [], None
    if not isinstance(placed, dict) or not all(isinstance(item, str) for item in placed.values()):
        raise ValueError(f"{folder / name} is no index of weights: weight_map does not name a file for each")
    for item in sorted(set(placed.values())):
        if own_file(folder, item) is None:
            raise ValueError(f"{folder} is incomplete: {name} names {item}, which is not there")
    return [], placed


def digest(folder: Path) -> str:
    """sha256 over configuration and weights."""
    hasher = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        hasher.update(f"{path.name} {files.sha256_of(path)}\n".encode())
    return hasher.hexdigest()


@contextmanager
def _laid_out(folder: Path, *, weights: bool = False, names: Iterable[str] = ()) -> Iterator[Path]:
    """A folder with links to what is read of a checkpoint, and nothing else: transformers looks for more by itself."""
    with tempfile.TemporaryDirectory(prefix="ropelab-") as made:
        place = Path(made)
        raw = read_json(folder / "config.json")
        files.write_json(place / "config.json", _without(raw, LEADING_AWAY))
        for name in names:
            if (found := own_file(folder, name)) is not None:
                (place / name).symlink_to(found.resolve())
        if weights:
            single, placed = _weights(folder)
            for path in single:
                (place / WEIGHTS).symlink_to(path.resolve())
            if placed is not None:
                shards = sorted(set(placed.values()))
                given = {name: f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i, name in enumerate(shards)}
                for name, link in given.items():
                    (place / link).symlink_to((folder / name).resolve())
                weight_map = {key: given[name] for key, name in placed.items()}
                files.write_json(place / INDEX, {"metadata": {}, "weight_map": weight_map})
        yield place


def _without(value: Any, keys: Iterable[str]) -> Any:
    """A JSON value without these keys, at whatever depth."""
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value


def tensor_count(folder: Path) -> int:
    """How many tensors the weights hold. `ValueError` as `_shapes`."""
    return len(_shapes(folder))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the weights, of the files' headers.

    `ValueError` for a damaged file, and for a tensor that two files hold.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as opened:
                held = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:  # the library has its own class
            raise ValueError(f"{folder} cannot be loaded ({_line(error)})") from None
        if twice := found.keys() & held.keys():
            raise ValueError(f"{folder} holds {min(twice)} in two of its files; leave one of them out")
        found |= held
    return found


def check_fits(folder: Path, model: nn.Module) -> None:
    """`ValueError` where config.json asks for more than the weights hold, before memory is taken for it.

    model: the `skeleton`. Less, and what is missing, is found when the weights are read. Only a tensor that has the
    same name in both is compared, by its number of elements: loading may turn and rename them, and quantised ones are
    packed. All together may be four times the weights' bytes (some two bits an element), and `MADE`, for what is built
    without them.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = model.state_dict(keep_vars=True)
    quantised = (read_json(folder / "config.json") or {}).get("quantization_config")
    for name, shape in _shapes(folder).items() if not quantised else ():
        due = next((wanted[key] for key in (name, prefix + name, name.removeprefix(prefix)) if key in wanted), None)
        if due is not None and due.numel() > math.prod(shape):
            raise ValueError(
                f"the checkpoint {folder} has another shape for {name} than its config.json asks for: {shape}, not "
                f"{tuple(due.shape)}; they do not belong together"
            )
    held = sum(path.stat().st_size for path in weight_files(folder))
    asked = sum(p.numel() for p in model.parameters()) + sum(b.numel() * b.element_size() for b in model.buffers())
    if asked > 4 * held + MADE:
        raise ValueError(
            f"{folder / 'config.json'} asks for a model of {asked:.1e} numbers, and the weights are {held:.1e} bytes: "
            "they do not belong together"
        )


# --- configuration ----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> Any:
    """The configuration of a causal language model. `ValueError` for an encoder, and for a model with its own code."""
    path = folder / "config.json"
    try:
        raw = files.load_json(path, limit=JSON_LIMIT, follow=True, finite=False)
    except (OSError, DamagedFileError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ValueError(f"{path} is no configuration of transformers: it names no model_type")
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        own = "comes with its own code, which is never run" if raw.get("auto_map") else "is not a model that it knows"
        raise ValueError(f"{folder}: model_type '{kind}' {own} (transformers {transformers.__version__})")
    _check_numbers(path, raw, tensor_count(folder))
    try:
        with quiet(), _laid_out(folder) as place:
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a wrong value raises whatever the configuration's class raises
        raise ValueError(f"{path} is refused by transformers ({_line(error)})") from None
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    built = raw.get("architectures")
    built = [name for name in built if isinstance(name, str)] if isinstance(built, list) else []
    if getattr(config, "is_encoder_decoder", False) or not known or not all(_causal(config, name) for name in built):
        what = built[0] if built else kind
        raise ValueError(f"{folder} is {what}, no causal language model: there is no next token to score")
    return config


def _check_numbers(path: Path, raw: Mapping[str, Any], tensors: int) -> None:
    """`ValueError` for a number that no model has, before anything is built of that size.

    tensors: those of the weights; a layer has at least one.
    """
    for where, value in rotary.walk(raw):
        if not isinstance(value, int):
            continue
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{path}: {'.'.join(where)} is a number of {len(str(abs(value)))} digits, which none is")
        if where and where[-1] in LAYERS and value > tensors:
            raise ValueError(
                f"{path} asks for {value} layers ({'.'.join(where)}), and the weights hold {tensors} tensors: they do "
                "not belong together"
            )
        if where and OF_LAYERS.fullmatch(where[-1]) and value > MOST_LAYERS:
            raise ValueError(f"{path} has {'.'.join(where)} {value}: no model has so many layers")


def _causal(config: Any, architecture: str) -> bool:
    """May this be the name of a causal language model? One that transformers knows as something else may not.

    A name that it does not know is one as published, such as MPTForCausalLM: loading decides.
    """
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = [one.__name__ for one in (classes if isinstance(classes, tuple | list) else (classes,))]
    if architecture in names or architecture.endswith("ForConditionalGeneration"):
        return True
    return not hasattr(transformers, architecture)


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
        with quiet(), _laid_out(folder, weights=True) as place:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                place, config=copy.deepcopy(config), dtype=dtype, use_safetensors=True, trust_remote_code=False,
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
    key = next((key for key in LENGTHS if getattr(text, key, None)), None)
    return None if key is None else whole(text, key)


def whole(config: Any, key: str) -> int:
    """A number of a configuration that counts something; `ValueError` with its key for what is none."""
    value = getattr(config, key, None)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**40:
        raise ValueError(f"config.json has no usable {key}: {str(value)[:40]} is no count")
    return value


def table_rows(model: nn.Module, config: Any) -> int | None:
    """The longest text that a model without rotation can read: rows of its position table; None: there is none."""
    text = config.get_text_config()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITION_TABLES:
            return module.num_embeddings - int(getattr(module, "offset", 0))
    # positions that are neither rotary nor ALiBi nor such a table end where the configuration says
    return getattr(text, "max_position_embeddings", None)


def read_tokenizer(folder: Path, rows: int) -> data.Tokenizer:
    """The checkpoint's tokeniser, ours where it is one; `rows`: of the model's table, which may be fewer than its ids.

    `ValueError` where there is none.
    """
    if own_file(folder, "tokenizer.json") is not None:
        source = read_json(folder / "tokenizer.json")
        if not isinstance(source, dict):
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged: it is no JSON object; fetch it again")
        return _own(folder / "tokenizer.json", source, rows)
    source, status, said = None, 0, "there are none"
    if any(own_file(folder, name) is not None for name in OF_TOKENIZERS if name not in BESIDE_VOCABULARIES):
        with _laid_out(folder, names=OF_TOKENIZERS) as place:
            status, said = data.apart(
                "import torch, transformers", _CONVERTED, {"place": str(place), "to": str(place / "made.json")},
                seconds=CONVERTING_SECONDS, spare=2**32,
            )  # fmt: skip
            source = read_json(place / "made.json") if not status else None
    if not isinstance(source, dict):  # each tokeniser fails in its own way without its files
        late = f"not in {CONVERTING_SECONDS} seconds"
        why = late if status == -signal.SIGPROF else (said.splitlines() or ["it fails"])[-1]
        raise ValueError(
            f"{folder} has no tokenizer.json, and none can be made of its files ({why}); write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        )
    return _own(folder, source, rows)


def _own(path: Path, source: Mapping[str, Any], rows: int) -> data.Tokenizer:
    try:
        return data.from_json(source, rows)
    except ValueError as error:
        raise ValueError(f"the checkpoint's {path} is no tokeniser: {error}; fetch it from its author again") from None


class Beginning(NamedTuple):
    """The token that a checkpoint's texts begin with."""

    token: int | None  # its id; None: there is none
    usual: bool  # does the tokeniser put it before a text by itself?


def beginning(folder: Path, tokenizer: data.Tokenizer) -> Beginning:
    """What the checkpoint's tokeniser begins a text with.

    Its post-processor says, unless `add_bos_token` of tokenizer_config.json does; the id is the post-processor's, else
    that of `bos_token` in tokenizer_config.json or special_tokens_map.json, else `bos_token_id` of config.json.
    """
    prefix = data.prefix(tokenizer)
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_json(folder / name) if own_file(folder, name) is not None else None
        said |= found if isinstance(found, dict) else {}
    token = prefix[0] if prefix else None
    content = said.get("bos_token")
    if isinstance(content, dict):
        content = content.get("content")
    if token is None and isinstance(content, str):
        token = data.token_id(tokenizer, content)
    raw = files.read_json(folder / "config.json")  # the class of a configuration would have a default
    for part in (raw, raw.get("text_config")):
        stated = part.get("bos_token_id") if isinstance(part, dict) else None
        if token is None and isinstance(stated, int) and not isinstance(stated, bool) and stated >= 0:
            token = stated
    given = said.get("add_bos_token")
    return Beginning(token, token is not None and (given if isinstance(given, bool) else bool(prefix)))


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
