"""The weights of a GPT of ours in the names and shapes of GPT-NeoX, MPT and GPT-2, and back.

Letters: V tokens that can be predicted (without the separator), C width, H heads, D head dimension, R rotated
dimensions, T rows of a table. Linears of GPT-2 are transposed, q, k and v of GPT-NeoX are packed head by head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ropelab.config import ModelConfig

State = dict[str, Tensor]

# ours, of a layer -> (theirs, has it a bias there?)
_LAYERS: dict[str, dict[str, tuple[str, bool]]] = {
    "gpt_neox": {
        "norm_attention": ("gpt_neox.layers.{}.input_layernorm", True),
        "qkv": ("gpt_neox.layers.{}.attention.query_key_value", False),
        "attention_out": ("gpt_neox.layers.{}.attention.dense", False),
        "norm_mlp": ("gpt_neox.layers.{}.post_attention_layernorm", True),
        "mlp_in": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", True),
        "mlp_out": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", True),
    },
    "mpt": {
        "norm_attention": ("transformer.blocks.{}.norm_1", False),
        "qkv": ("transformer.blocks.{}.attn.Wqkv", False),
        "attention_out": ("transformer.blocks.{}.attn.out_proj", False),
        "norm_mlp": ("transformer.blocks.{}.norm_2", False),
        "mlp_in": ("transformer.blocks.{}.ffn.up_proj", False),
        "mlp_out": ("transformer.blocks.{}.ffn.down_proj", False),
    },
    "gpt2": {
        "norm_attention": ("transformer.h.{}.ln_1", True),
        "qkv": ("transformer.h.{}.attn.c_attn", True),
        "attention_out": ("transformer.h.{}.attn.c_proj", True),
        "norm_mlp": ("transformer.h.{}.ln_2", True),
        "mlp_in": ("transformer.h.{}.mlp.c_fc", True),
        "mlp_out": ("transformer.h.{}.mlp.c_proj", True),
    },
}
_TOKENS = {"gpt_neox": "gpt_neox.embed_in", "mpt": "transformer.wte", "gpt2": "transformer.wte"}
_NORM_OUT = {
    "gpt_neox": ("gpt_neox.final_layer_norm", True),
    "mpt": ("transformer.norm_f", False),
    "gpt2": ("transformer.ln_f", True),
}
TABLE = "transformer.wpe.weight"  # of GPT-2: positions
FAMILIES = tuple(_LAYERS)


def to_family(
    family: str, state: Mapping[str, Tensor], shape: ModelConfig, *, interleaved: int = 0, table: Tensor | None = None,
    token_scale: float = 1.0,
) -> State:  # fmt: skip
    """The weights of one of `FAMILIES`, without the separator's row.

    interleaved: R, where pairs are (2i, 2i+1) and have to become (i, i + R/2). table: positions (T, C) of GPT-2.
    token_scale: a factor on the embeddings; the head is then no longer the same tensor.
    """
    out: State = {}

    def put(name: str, weight: Tensor, has_bias: bool) -> None:
        out[f"{name}.weight"] = weight.contiguous()
        if has_bias:
            out[f"{name}.bias"] = torch.zeros(weight.shape[-1 if family == "gpt2" and weight.dim() == 2 else 0])

    tokens = state["tokens.weight"][:-1]  # (V, C)
    out[f"{_TOKENS[family]}.weight"] = (tokens * token_scale if token_scale != 1 else tokens).contiguous()
    if token_scale != 1:
        out["lm_head.weight"] = tokens.clone()
    for layer in range(shape.n_layer):
        for ours, (theirs, has_bias) in _LAYERS[family].items():
            weight = state[f"blocks.{layer}.{ours}.weight"]
            if ours == "qkv":
                weight = _turned(weight, shape, interleaved, _half_split)
                weight = _by_head(weight, shape) if family == "gpt_neox" else weight
            if family == "gpt2" and weight.dim() == 2:
                weight = weight.T
            put(theirs.format(layer), weight, has_bias)
    name, has_bias = _NORM_OUT[family]
    put(name, state["norm_out.weight"], has_bias)
    if table is not None:
        out[TABLE] = table.contiguous()
    return out


def from_family(
    family: str, state: Mapping[str, Tensor], shape: ModelConfig, *, interleaved: int = 0, tied: bool = True
) -> State:
    """The inverse: ours in fp32, without the separator's row, and without a table of positions.

    Where head and embeddings are not tied the tokens are the head's; the embeddings, which may differ by a factor
    (`token_scale`), are left to the caller. `ValueError` for a tensor that is missing, has another shape, or is a bias
    that is not zero.
    """
    wanted = _expected(family, shape)
    head = f"{_TOKENS[family]}.weight" if tied else "lm_head.weight"
    if head not in state:
        raise ValueError(f"the checkpoint lacks {head}")
    ignored = re.compile(r"(lm_head|embed_out)\.weight|.*\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)|"
                         r".*\.attn\.(masked_)?bias|" + re.escape(TABLE))  # fmt: skip
    for name in state:
        if name not in wanted and not ignored.fullmatch(name):
            if name.endswith(".bias") and not state[name].any():
                continue
            raise ValueError(f"the checkpoint has {name}, which a GPT of ours has not")
    for name, due in wanted.items():
        if name not in state:
            raise ValueError(f"the checkpoint lacks {name}")
        if due and tuple(state[name].shape) != due:
            raise ValueError(f"{name} of the checkpoint is {tuple(state[name].shape)}, not {due}")
    ours: State = {"tokens.weight": state[head]}
    for layer in range(shape.n_layer):
        for name, (theirs, has_bias) in _LAYERS[family].items():
            weight = state[f"{theirs.format(layer)}.weight"]
            if has_bias and state[f"{theirs.format(layer)}.bias"].any():
                raise ValueError(f"{theirs.format(layer)}.bias of the checkpoint is not zero; ours has no biases")
            if family == "gpt2" and weight.dim() == 2:
                weight = weight.T
            if name == "qkv":
                weight = _by_kind(weight, shape) if family == "gpt_neox" else weight
                weight = _turned(weight, shape, interleaved, _interleaved)
            ours[f"blocks.{layer}.{name}.weight"] = weight.contiguous()
    name, has_bias = _NORM_OUT[family]
    if has_bias and state[f"{name}.bias"].any():
        raise ValueError(f"{name}.bias of the checkpoint is not zero; ours has no biases")
    ours["norm_out.weight"] = state[f"{name}.weight"]
    return {name: tensor.float().contiguous() for name, tensor in ours.items()}


def embeddings(family: str, state: Mapping[str, Tensor]) -> Tensor:
    """The token table that the first layer reads, (V, C)."""
    return state[f"{_TOKENS[family]}.weight"]


def _expected(family: str, shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of our shape holds, with its shape; () where that is the tokeniser's matter."""
    width = shape.d_model
    sizes = {
        "norm_attention": (width,), "norm_mlp": (width,), "qkv": (3 * width, width), "attention_out": (width, width),
        "mlp_in": (4 * width, width), "mlp_out": (width, 4 * width),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {f"{_TOKENS[family]}.weight": ()}
    for layer in range(shape.n_layer):
        for ours, (theirs, has_bias) in _LAYERS[family].items():
            size = sizes[ours]
            found[f"{theirs.format(layer)}.weight"] = size[::-1] if family == "gpt2" else size
            if has_bias:
                found[f"{theirs.format(layer)}.bias"] = size[:1]
    name, has_bias = _NORM_OUT[family]
    found[f"{name}.weight"] = (width,)
    if has_bias:
        found[f"{name}.bias"] = (width,)
    return found


def _by_head(weight: Tensor, shape: ModelConfig) -> Tensor:
    """(3C, C) with rows by (q k v, head, dimension) -> rows by (head, q k v, dimension)."""
    # (3C, C) -> (3, H, D, C) -> (H, 3, D, C) -> (3C, C)
    return weight.view(3, shape.n_head, shape.d_head, -1).transpose(0, 1).reshape(weight.shape)


def _by_kind(weight: Tensor, shape: ModelConfig) -> Tensor:
    """The inverse of `_by_head`."""
    # (3C, C) -> (H, 3, D, C) -> (3, H, D, C) -> (3C, C)
    return weight.reshape(shape.n_head, 3, shape.d_head, -1).transpose(0, 1).reshape(weight.shape)


def _turned(weight: Tensor, shape: ModelConfig, rotated: int, order: Callable[[int], Tensor]) -> Tensor:
    """The rows (3C, C) of q and k with their first `rotated` dimensions of each head in another order."""
    if not rotated:
        return weight
    # (3C, C) -> (3, H, D, C)
    split = weight.view(3, shape.n_head, shape.d_head, -1).clone()
    split[:2, :, :rotated] = split[:2, :, order(rotated)]
    return split.reshape(weight.shape)


def _half_split(rotated: int) -> Tensor:
    """Where dimension i of the half-split layout is in the interleaved one: 0, 2, 4, ..., 1, 3, 5, ..."""
    return torch.cat((torch.arange(0, rotated, 2), torch.arange(1, rotated, 2)))


def _interleaved(rotated: int) -> Tensor:
    """The inverse order."""
    return torch.argsort(_half_split(rotated))


def shape_of(config: Any) -> ModelConfig:
    """The sizes of a GPT-NeoX, MPT or GPT-2 configuration; `ValueError` with the first thing that ours has not."""
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"a {family} checkpoint has no counterpart here; import takes GPT-NeoX, MPT and GPT-2 shapes")
    width = config.hidden_size
    wrong: dict[str, Any] = {}
    if family == "gpt_neox":
        needed = {
            "use_parallel_residual": False, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
            "intermediate_size": 4 * width, "tie_word_embeddings": True,
        }  # fmt: skip
    elif family == "mpt":
        needed = {
            "no_bias": True, "layer_norm_epsilon": 1e-5, "expansion_ratio": 4, "logit_scale": None,
            "tie_word_embeddings": True,
        }  # fmt: skip
        own = config.attn_config
        for key, value in (("alibi", True), ("alibi_bias_max", 8), ("clip_qkv", None), ("qk_ln", False)):
            if getattr(own, key) != value:
                wrong[f"attn_config.{key}"] = getattr(own, key)
        if own.softmax_scale not in (None, (width // config.num_attention_heads) ** -0.5):
            wrong["attn_config.softmax_scale"] = own.softmax_scale
    else:
        needed = {
            "activation_function": "gelu", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        }  # fmt: skip
        if config.n_inner not in (None, 4 * width):
            wrong["n_inner"] = config.n_inner
    wrong |= {key: getattr(config, key) for key, value in needed.items() if getattr(config, key) != value}
    if wrong:
        key, value = next(iter(wrong.items()))
        due = needed.get(key, "its default")
        raise ValueError(f"the checkpoint has {key}={value}, and a GPT of ours {due}: it is not of our shape")
    return ModelConfig(
        "imported", n_layer=config.num_hidden_layers, d_model=width, n_head=config.num_attention_heads, qk_norm=False
    )
