"""A pre-norm GPT that knows about position only what its encoding's record says.

Letters: B sequences, T tokens, C width, H heads, D head dimension, V entries of the vocabulary. LayerNorm without
bias, exact GELU, linears without bias, tied head: in this shape a run maps exactly onto GPT-NeoX (RoPE), MPT (ALiBi)
and GPT-2 (learned) of transformers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ropelab.attention import Attend, Bias
from ropelab.config import ModelConfig
from ropelab.positions import STD, CumulativeDecay, PositionEncoding, Positions, Rotation

NORM_EPS = 1e-5
ALIGNED = {"cuda": 64}  # what the rows of the head must be a multiple of for the fast matrix products of a device


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first R dimensions of x (B, H, T, D) by the angles whose cos and sin are (T, R/2); in fp32.

    Where every sequence has positions of its own, cos and sin are (B, 1, T, R/2).
    """
    rotated = 2 * cos.shape[-1]  # R
    head, rest = x[..., :rotated].float(), x[..., rotated:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]  # (B, H, T, R/2)
        # (B, H, T, R/2, 2) -> (B, H, T, R)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = head.chunk(2, dim=-1)  # (B, H, T, R/2)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def _rotated(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, T, D) at the angles of a rotation."""
    return (
        rotate(q, rotation.cos_q, rotation.sin_q, interleaved=rotation.interleaved),
        rotate(k, rotation.cos_k, rotation.sin_k, interleaved=rotation.interleaved),
    )


ContentBias = Callable[[Tensor], CumulativeDecay | None]
"""A layer's normalised input (B, T, C) -> the bias that the encoding computes from it."""


class Prepared(NamedTuple):
    """What one forward pass needs to know about position: computed once, used by every layer."""

    record: Positions
    attend: Attend


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.n_head = config.n_head
        self.norm_attention = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.norm_q = nn.LayerNorm(config.d_head, eps=NORM_EPS, bias=False) if config.qk_norm else None
        self.norm_k = nn.LayerNorm(config.d_head, eps=NORM_EPS, bias=False) if config.qk_norm else None

    def heads(self, x: Tensor, record: Positions) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Normalised x (B, T, C) -> q, k, v (B, H, T, D) with their positions, and q, k of the score of far keys."""
        batch, length, width = x.shape
        if record.qk_embedding is None:
            packed = self.qkv(x)  # (B, T, 3C)
        else:  # queries and keys see the position, values do not
            weight = self.qkv.weight  # (3C, C)
            with_position = F.linear(x + record.qk_embedding, weight[: 2 * width])
            packed = torch.cat((with_position, F.linear(x, weight[2 * width :])), dim=-1)
        # (B, T, 3C) -> (B, T, 3, H, D) -> three of (B, H, T, D)
        q, k, v = packed.view(batch, length, 3, self.n_head, width // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        far = None if record.far is None else _rotated(q, k, record.far.rotation)
        if record.rotation is not None:
            q, k = _rotated(q, k, record.rotation)
        return q, k, v, far

    def forward(self, x: Tensor, prepared: Prepared, content: ContentBias | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `content`: the bias computed from this layer's input, if any."""
        if not torch.is_grad_enabled() and x.shape[1] > pieces_of(x.device):
            return self._in_pieces(x, prepared, content)
        normed = self.norm_attention(x)
        q, k, v, far = self.heads(normed, prepared.record)
        attended = prepared.attend(q, k, v, far=far, decay=None if content is None else content(normed))
        return self._after_attention(x, attended)

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (B, T, C), attended (B, H, T, D) -> (B, T, C): the rest of the layer."""
        # (B, H, T, D) -> (B, T, C)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))
        return out

    def _in_pieces(self, x: Tensor, prepared: Prepared, content: ContentBias | None) -> Tensor:
        """The same in place and without a gradient; all but the attention for one piece of the sequence at a time.

        Of a long sequence only x, q, k, v and what attention makes of them exist in full.
        """
        length = x.shape[1]
        step = pieces_of(x.device)
        pieces = [slice(low, min(low + step, length)) for low in range(0, length, step)]
        whole: list[Tensor] = []  # q, k, v and, with scores of their own for far keys, two more: (B, H, T, D)
        for rows in pieces:
            q, k, v, far = self.heads(self.norm_attention(x[:, rows]), prepared.record.at(rows))
            parts = (q, k, v, *(far or ()))  # (B, H, rows, D)
            whole = whole or [part.new_empty(*part.shape[:2], length, part.shape[3]) for part in parts]
            for full, part in zip(whole, parts, strict=True):
                full[:, :, rows] = part
        decay = None if content is None else content(self.norm_attention(x))
        attended = prepared.attend(*whole[:3], far=(whole[3], whole[4]) if whole[3:] else None, decay=decay)
        del whole, q, k, v, far, parts
        for rows in pieces:
            x[:, rows] = self._after_attention(x[:, rows], attended[:, :, rows])
        return x


class GPT(nn.Module):
    """Tokens to hidden states; the head is the token table, and `nll` its loss.

    n_vocab counts the separator, whose id is the last: it has a row in the table but is never predicted. seed: of the
    start; None leaves the tensors as torch makes them, for weights that are loaded.
    """

    def __init__(self, config: ModelConfig, n_vocab: int, encoding: PositionEncoding, *, seed: int | None) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(n_vocab, config.d_model)
        self.encoding = encoding
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_out = nn.LayerNorm(config.d_model, eps=NORM_EPS, bias=False)
        self.activation_checkpointing = False  # keep each block's input alone for the backward pass
        self._prepared: tuple[object, Prepared] | None = None
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every tensor from a generator keyed by (seed, its name).

        A table more or less in one encoding therefore shifts no other tensor's draws: encodings are compared from
        the same start.

        | tensor                                | start                                     |
        |---------------------------------------|-------------------------------------------|
        | norms                                 | as their modules set them (1)             |
        | token table                           | N(0, 0.02), or the encoding's `token_std` |
        | attention_out, mlp_out                | N(0, 0.02 / sqrt(2 n_layer)) (GPT-2)      |
        | other matrices                        | N(0, 0.02)                                |
        | parameters of an encoding             | its `init_parameter`                                |
        """
        for name, parameter in self.named_parameters():
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            if name.startswith("encoding."):
                drawn = self.encoding.init_parameter(name.removeprefix("encoding."), parameter.shape, generator)
                if drawn is not None:
                    parameter.copy_(drawn)
            elif parameter.dim() >= 2:
                std = STD
                if name == "tokens.weight":
                    std = self.encoding.token_std(self.config.d_model)
                elif name.endswith(("attention_out.weight", "mlp_out.weight")):
                    std = STD / (2 * self.config.n_layer) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def set_training_fraction(self, done: float) -> None:
        """Tell the encoding the fraction of the training that is done, 0 .. 1."""
        if self.encoding.set_training_fraction(done):
            self._prepared = None

    def prepare(self, length: int, *, window: int | None = None, positions: Tensor | None = None) -> Prepared:
        """The position record of `length` tokens and the attention that serves it.

        `positions` (B, T) int64 are those of each sequence; None: 0 .. length-1 for all. Without trained positional
        parameters the last record of such is kept, so that a training loop builds it once. `ContextLengthError` where
        the encoding is undefined at this length.
        """
        device = self.tokens.weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.tokens.weight.dtype
        key = (length, window, device, dtype, self.training, self.encoding)
        if positions is None and self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1]
        # positions are never computed below fp32
        with torch.autocast(device.type, enabled=False):
            if positions is None:
                record = self.encoding(torch.arange(length, device=device), ctx=length)
            else:
                record = _by_sequence(self.encoding(positions.flatten(), ctx=length), positions)
            bias = bias_of(record, decays=self.encoding.content_dependent, window=window)
            attend = Attend(length, bias=bias, device=device, training=self.training, dtype=dtype)
        prepared = Prepared(record, attend)
        if positions is None and next(self.encoding.parameters(), None) is None:
            self._prepared = (key, prepared)
        return prepared

    def forward(self, tokens: Tensor, *, window: int | None = None, positions: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64, positions (B, T) int64 or None -> hidden states after the last norm, (B, T, C)."""
        prepared = self.prepare(tokens.shape[1], window=window, positions=positions)
        x = self.embed(tokens, prepared)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            if recompute:
                content = self.content_bias(layer)
                x = checkpoint(block, x, prepared, content, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, prepared, self.content_bias(layer))
        out: Tensor = self.norm_out(x)
        return out

    def embed(self, tokens: Tensor, prepared: Prepared) -> Tensor:
        """tokens (B, T) int64 -> the input of the first layer, (B, T, C)."""
        x: Tensor = self.tokens(tokens) * self.encoding.token_scale()
        return x if prepared.record.embedding is None else x + prepared.record.embedding

    def content_bias(self, layer: int) -> ContentBias | None:
        """The bias that the encoding computes from the input of a layer; None where it computes none."""
        return functools.partial(self.encoding.content_bias, layer) if self.encoding.content_dependent else None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> scores of the V - 1 tokens that can be predicted; the separator has none."""
        weight = self.tokens.weight[:-1]  # (V - 1, C)
        missing = -len(weight) % ALIGNED.get(weight.device.type, 1)
        if not missing:
            return F.linear(hidden, weight)
        # rows of zeros whose scores are cut off before any softmax
        return F.linear(hidden, F.pad(weight, (0, 0, 0, missing)))[..., : len(weight)]

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of every target in nats, fp32: hidden (..., C), targets (...) -> (...); 0 where the separator is due.

        At most `logits_held` scores exist at a time, forward and backward.
        """
        rows = max(1, logits_held(hidden.device, training=torch.is_grad_enabled()) // self.tokens.num_embeddings)
        flat, wanted = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
        if len(wanted) <= rows:
            return self._nll(flat, wanted).view(targets.shape)
        parts = []
        for low in range(0, len(wanted), rows):
            part = flat[low : low + rows], wanted[low : low + rows]
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._nll, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._nll(*part))
        return torch.cat(parts).view(targets.shape)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, C), targets (N,) -> (N,), with all their scores (N, V - 1) at once."""
        scores = self.logits(hidden).float()
        return F.cross_entropy(scores, targets, ignore_index=self.tokens.num_embeddings - 1, reduction="none")

    def n_parameters(self) -> int:
        """Trained numbers, the tied table once."""
        return sum(p.numel() for p in self.parameters())


def bias_of(record: Positions, *, decays: bool, window: int | None = None) -> Bias:
    """What a record says of the scores. `decays`: does the encoding read the text?"""
    return Bias(
        by_distance=record.bias,
        slopes=record.slopes,
        by_query=record.query_bias,
        window=window,
        block=record.block,
        far=None if record.far is None else record.far.window,
        decays=decays,
        scale=record.logit_scale,
    )


def pieces_of(device: torch.device) -> int:
    """Tokens of a piece in a pass without gradients: few enough for a CPU's caches, enough to fill a GPU."""
    return 4096 if device.type == "cpu" else 32768


def pass_bytes(config: ModelConfig, n_vocab: int, tokens: int, device: torch.device, *, far: bool = False) -> int:
    """Memory that one pass over `tokens` tokens without gradients takes beside the weights, in bytes; an upper bound.

    In full exist x, q, k, v, the attention's output, one more such tensor while they are made, and q and k again where
    far keys have scores of their own: each tokens x C in fp32. Beside them a piece of the MLP, the scores of a part of
    the vocabulary's head, and the blocks of an attention kernel.
    """
    full = (6 + 2 * far) * tokens * config.d_model
    piece = 16 * min(tokens, pieces_of(device)) * config.d_model
    head = 3 * min(tokens * n_vocab, logits_held(device, training=False))
    blocks = 2**25 if device.type == "cpu" else 2**28
    return 4 * (full + piece + head + blocks)


def logits_held(device: torch.device, *, training: bool) -> int:
    """Scores of head and loss that exist at a time: what keeps a CPU's caches useful, or a share of a GPU's memory."""
    if device.type == "cuda" and training:
        # with their gradient 8 to 10 bytes each: a sixth of the memory
        return int(torch.cuda.get_device_properties(device).total_memory) // 64
    if device.type == "cpu":
        return 2**27 if training else 2**24  # 512 MB, 64 MB in fp32
    return 2**28  # 1 GB


def _by_sequence(record: Positions, positions: Tensor) -> Positions:
    """The record of B x T positions, its tensors in the shapes that broadcast against B sequences."""
    batch, length = positions.shape
    assert (record.bias, record.query_bias, record.far, record.logit_scale) == (None, None, None, None)

    def by_sequence(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.view(batch, length, -1)  # (B x T, C) -> (B, T, C)

    rotation = record.rotation
    if rotation is not None:
        # (B x T, R/2) -> (B, 1, T, R/2)
        cos_q, sin_q, cos_k, sin_k = (part.view(batch, 1, length, -1) for part in rotation[:4])
        rotation = Rotation(cos_q, sin_q, cos_k, sin_k, rotation.interleaved)
    return record._replace(
        embedding=by_sequence(record.embedding),
        qk_embedding=by_sequence(record.qk_embedding),
        rotation=rotation,
    )
