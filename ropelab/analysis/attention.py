"""Where a trained model looks: its attention by distance on real text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ropelab.config import Method
from ropelab.devices import resolve_device
from ropelab.model import GPT
from ropelab.progress import Progress, silent
from ropelab.runs import OpenRun, set_encoding

QUERIES = 64  # the last so many positions of a window are asked
DOCUMENTS = 4


def bucket_edges(ctx: int) -> list[int]:
    """0, 1, 2, 4, 8, ... and ctx: bucket k holds the distances from edge k up to, and without, edge k + 1."""
    return [0, *(2**k for k in range(ctx.bit_length()) if 2**k < ctx), ctx]


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor, queries: int) -> Iterator[Tensor]:
    """Attention of the last `queries` of tokens (B, T) int64, layer by layer: (B, H, queries, T) fp32."""
    length = tokens.shape[1]
    prepared = model.prepare(length)
    x = model.embed(tokens, prepared)
    for layer, block in enumerate(model.blocks):
        content = model.content_bias(layer)
        normed = block.norm_attention(x)  # type: ignore[operator]
        q, k, _, far = block.heads(normed, prepared.record)  # type: ignore[operator]
        decay = None if content is None else content(normed)
        yield prepared.attend.weights(q, k, range(length - queries, length), far=far, decay=decay)
        x = block(x, prepared, content)


def distances(queries: int, length: int) -> Tensor:
    """(Q, T) int64: how far key j is behind each of the last Q of T positions; negative in the future."""
    return torch.arange(length - queries, length)[:, None] - torch.arange(length)


def by_distance(weights: Tensor, edges: list[int]) -> Tensor:
    """Weights (B, H, Q, T) of the last Q of T positions -> mean mass by bucket of distance, (H, buckets) fp64."""
    distance = distances(*weights.shape[-2:]).to(weights.device)  # (Q, T)
    exact = weights.double() if weights.device.type != "mps" else weights
    parts = [
        exact.masked_fill((distance < low) | (distance >= high), 0).sum(-1).mean((0, 2))  # (H,)
        for low, high in itertools.pairwise(edges)
    ]
    return torch.stack(parts, dim=-1).cpu().double()


def attention_by_distance(
    run: OpenRun,
    scaling: Method,
    *,
    ctx: int,
    device: str = "auto",
    cache_dir: str,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attention of a finished run by distance, on the first `ctx` tokens of test documents of its own text.

    `scaling` has its factor as a number. The last QUERIES positions of DOCUMENTS documents are asked. Returns {"ctx",
    "scaling", "factor", "text", "split", "documents", "queries": in all, "edges": as `bucket_edges`, "mass":
    [layer][head][bucket], mean share of a query's attention, summing to 1 over the buckets, "uniform": [bucket], what
    that is for attention that sees all keys alike, "beyond": [layer][head], the share at distances of train_ctx and
    more, "mean_distance": [layer][head], in tokens}. `ValueError` when no document is long enough, and where the
    encoding is undefined.
    """
    target = resolve_device(device)
    run.weights  # noqa: B018 - refused before any text is read
    encoding = run.encoding(scaling)
    with torch.no_grad():
        encoding(torch.arange(1), ctx=ctx)  # before any text is read
    corpus = run.corpus(cache_dir, progress)
    split = corpus.test
    lengths = [len(split.document(i)) for i in range(len(split))]
    chosen = [i for i, length in enumerate(lengths) if length >= ctx][:DOCUMENTS]
    if not chosen:
        raise ValueError(f"no test document holds {ctx} tokens; use --ctx {max(lengths, default=0)} or less")
    model = run.model(target)
    set_encoding(model, encoding)
    queries, train_ctx = min(QUERIES, ctx), run.config.train.ctx
    edges = bucket_edges(ctx)
    back = distances(queries, ctx).clamp(min=0).to(target)  # (Q, T)
    mass, beyond, mean_distance = [], [], []  # by document and layer
    for done, i in enumerate(chosen):
        tokens = torch.from_numpy(split.document(i)[:ctx].astype("int64"))[None].to(target)  # (1, T)
        layers = list(attention_weights(model, tokens, queries))
        mass.append(torch.stack([by_distance(layer, edges) for layer in layers]))  # (layers, H, buckets)
        far = [(layer * (back >= train_ctx)).sum(-1).mean((0, 2)) for layer in layers]
        beyond.append(torch.stack(far).cpu())  # (layers, H)
        mean_distance.append(torch.stack([(layer * back).sum(-1).mean((0, 2)) for layer in layers]).cpu())
        progress("attention", done + 1, len(chosen), run=run.name)
    uniform = torch.ones(1, 1, queries, ctx).masked_fill(distances(queries, ctx) < 0, 0)
    return {
        "ctx": ctx,
        "scaling": scaling.name,
        "factor": scaling.parameters.get("factor"),
        "text": corpus.name,
        "split": "test",
        "documents": len(chosen),
        "queries": queries * len(chosen),
        "edges": edges,
        "mass": torch.stack(mass).mean(0).tolist(),
        "uniform": by_distance(uniform / uniform.sum(-1, keepdim=True), edges)[0].tolist(),
        "beyond": torch.stack(beyond).mean(0).tolist(),
        "mean_distance": torch.stack(mean_distance).mean(0).tolist(),
    }
