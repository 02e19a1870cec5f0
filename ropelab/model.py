"""A pre-norm GPT that knows about position only what its encoding's record says.

Letters: B sequences, T tokens, C width, H heads, D head dimension, V entries of the vocabulary. LayerNorm without
bias, exact GELU, linears without bias, tied head: in this shape a run maps exactly onto GPT-NeoX (RoPE), MPT (ALiBi)
and GPT-2 (learned) of transformers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ropelab.attention import Attend
from ropelab.positions import PositionEncoding, Rotation
from ropelab.schema import ModelConfig

NORM_EPS = 1e-5
STD = 0.02  # GPT-2's initial standard deviation


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first R dimensions of x (B, H, T, D) by the angles whose cos and sin are (T, R/2); in fp32."""
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

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        batch, length, width = x.shape
        # (B, T, 3C) -> (B, T, 3, H, D) -> three of (B, H, T, D)
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if rotation is not None:
            q = rotate(q, rotation.cos_q, rotation.sin_q, interleaved=rotation.interleaved)
            k = rotate(k, rotation.cos_k, rotation.sin_k, interleaved=rotation.interleaved)
        # (B, H, T, D) -> (B, T, C)
        x = x + self.attention_out(attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))
        return out


class Prepared(NamedTuple):
    """What one forward pass needs to know about position: computed once, used by every layer."""

    embedding: Tensor | None  # (T, C)
    rotation: Rotation | None
    attend: Attend


class GPT(nn.Module):
    """Tokens to hidden states; the head is the token table, and `nll` its loss.

    n_vocab counts the separator, whose id is the last: it has a row in the table but is never predicted.
    """

    def __init__(self, config: ModelConfig, n_vocab: int, encoding: PositionEncoding, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(n_vocab, config.d_model)
        self.encoding = encoding
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_out = nn.LayerNorm(config.d_model, eps=NORM_EPS, bias=False)
        self._prepared: tuple[object, Prepared] | None = None
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every tensor from a generator keyed by (seed, its name).

        A table more or less in one encoding therefore shifts no other tensor's draws: encodings are compared from
        the same start.

        | tensor                                | start                                     |
        |---------------------------------------|-------------------------------------------|
        | norms, scalars of an encoding         | as their modules set them (1)             |
        | token table                           | N(0, 0.02), or the encoding's `token_std` |
        | attention_out, mlp_out                | N(0, 0.02 / sqrt(2 n_layer)) (GPT-2)      |
        | other matrices, learned position table| N(0, 0.02)                                |
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = STD
            if name == "tokens.weight":
                std = self.encoding.token_std(self.config.d_model)
            elif name.endswith(("attention_out.weight", "mlp_out.weight")):
                std = STD / (2 * self.config.n_layer) ** 0.5
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def prepare(self, length: int, *, window: int | None = None) -> Prepared:
        """The position record of `length` contiguous tokens and the attention that serves it.

        Without trained positional parameters the last one is kept, so that a training loop builds it once.
        `ContextLengthError` where the encoding is undefined at this length.
        """
        device = self.tokens.weight.device
        key = (length, window, device, self.training)
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1]
        record = self.encoding(torch.arange(length, device=device), ctx=length)
        attend = Attend(length, bias=record.bias, window=window, device=device, training=self.training)
        prepared = Prepared(record.embedding, record.rotation, attend)
        if next(self.encoding.parameters(), None) is None:
            self._prepared = (key, prepared)
        return prepared

    def forward(self, tokens: Tensor, *, window: int | None = None) -> Tensor:
        """tokens (B, T) int64 -> hidden states after the last norm, (B, T, C)."""
        prepared = self.prepare(tokens.shape[1], window=window)
        x = self.tokens(tokens) * self.encoding.token_scale()
        if prepared.embedding is not None:
            x = x + prepared.embedding
        for block in self.blocks:
            x = block(x, prepared.rotation, prepared.attend)
        out: Tensor = self.norm_out(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> scores of the V - 1 tokens that can be predicted; the separator has none."""
        return F.linear(hidden, self.tokens.weight[:-1])

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of every target in nats, fp32: hidden (..., C), targets (...) -> (...); 0 where the separator is due."""
        scores = self.logits(hidden).float().flatten(0, -2)  # (N, V - 1)
        losses = F.cross_entropy(
            scores, targets.flatten(), ignore_index=self.tokens.num_embeddings - 1, reduction="none"
        )
        return losses.view(targets.shape)

    def n_parameters(self) -> int:
        """Trained numbers, the tied table once."""
        return sum(p.numel() for p in self.parameters())
