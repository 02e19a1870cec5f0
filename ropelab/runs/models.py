"""The model of a run and the encodings that it can be given; and whether a scaling did change the record."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ropelab.config import Config, Method
from ropelab.errors import ContextLengthError
from ropelab.model import GPT
from ropelab.positions import Geometry, PositionEncoding, encoding_digest
from ropelab.scalings import build, make_scaling

NO_SCALING = Method("none", {})


def build_model(config: Config, n_vocab: int, *, scaling: Method, original_ctx: int) -> GPT:
    """The GPT of a configuration with freshly drawn weights, on the CPU."""
    encoding = build(config.pos, scaling, Geometry.of(config.model, original_ctx))
    return GPT(config.model, n_vocab, encoding, seed=config.seed)


def encoding_of(trained: Config, scaling: Method, original_ctx: int) -> PositionEncoding:
    """The encoding of a finished run under a scaling, without its trained tensors. `ValueError` as `build`."""
    encoding = build(trained.pos, scaling, Geometry.of(trained.model, original_ctx))
    encoding.set_training_fraction(1.0)
    return encoding


def restored_model(
    config: Config, n_vocab: int, weights: Mapping[str, Tensor], *, original_ctx: int, device: torch.device
) -> GPT:
    """The GPT of a configuration with these weights, without a scaling, ready to be evaluated.

    `ValueError` where they are not a model's of this configuration.
    """
    table = weights.get("tokens.weight", torch.empty(0))
    # before anything of these sizes is made
    if tuple(table.shape) != (n_vocab, config.model.d_model) or config.model.n_layer > len(weights):
        raise ValueError("the token table or the number of layers is another")
    encoding = build(config.pos, NO_SCALING, Geometry.of(config.model, original_ctx))
    with torch.device("meta"):  # no tensor is drawn that is then overwritten
        model = GPT(config.model, n_vocab, encoding, seed=None)
    model.to_empty(device=device)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:  # other names or shapes
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    model.set_training_fraction(1.0)
    return model.eval()


def set_encoding(model: GPT, encoding: PositionEncoding) -> None:
    """Let a trained model see positions by another encoding of the same weights: the one that it has, scaled."""
    encoding.load_state_dict(model.encoding.state_dict(), strict=True)
    model.encoding = encoding.to(model.tokens.weight.device)


def check_applied(method: Method, plain: PositionEncoding, original_ctx: int, ctx: int, digest: str) -> bool:
    """Whether a scaling is the identity, by its definition, at this ctx with these parameters.

    `plain` is the run's encoding without it, `digest` that of the scaled one. `ValueError` where it is not and yet
    changed nothing.
    """
    if method.name == "none":
        return False
    idle = make_scaling(method, original_ctx).is_identity(ctx)
    try:
        unchanged = digest == encoding_digest(plain, ctx)
    except ContextLengthError:
        unchanged = False  # undefined without the scaling
    if unchanged and not idle:
        raise ValueError(
            f"scaling={method.name} changed nothing at {ctx} tokens, so its number would be that of the plain model; "
            "choose other parameters, or leave it out"
        )
    assert unchanged or not idle, f"scaling={method.name} is the identity at {ctx}, and changed the record"
    return idle
