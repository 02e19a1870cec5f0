"""The GPT against transformers' models of the same shape, and the properties that comparisons rest on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ropelab import model
from ropelab.config import Method, ModelConfig
from ropelab.model import GPT, rotate
from ropelab.positions import Geometry
from ropelab.scalings import build
from tests.test_positions import method

VOCAB, LENGTH = 97, 24
NONE = Method("none", {})


def gpt(
    pos: str, scaling: Method = NONE, *, heads: int = 4, qk_norm: bool = False, seed: int = 0, **changes: object
) -> GPT:
    config = ModelConfig("test", n_layer=3, d_model=64, n_head=heads, qk_norm=qk_norm)
    model = GPT(config, VOCAB, build(method("pos", pos, **changes), scaling, Geometry(64, heads, LENGTH)), seed=seed)
    with torch.no_grad():  # larger than the start, so that differences show
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
            else:
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()).view(parameter.shape))
    return model.eval()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB - 1, (2, length), generator=torch.Generator().manual_seed(3))


def scores(model: GPT, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(x))


def as_gpt_neox(model: GPT, parameters: dict[str, object]) -> torch.nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
            hidden_act="gelu", max_position_embeddings=LENGTH, use_parallel_residual=False, layer_norm_eps=1e-5,
            tie_word_embeddings=True, attention_bias=True, rope_parameters=parameters, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
        theirs.gpt_neox.embed_in.weight.copy_(model.tokens.weight)
        theirs.gpt_neox.final_layer_norm.weight.copy_(model.norm_out.weight)
        for ours, layer in zip(model.blocks, theirs.gpt_neox.layers, strict=True):
            layer.input_layernorm.weight.copy_(ours.norm_attention.weight)
            layer.post_attention_layernorm.weight.copy_(ours.norm_mlp.weight)
            # (3, H, D, C) -> (H, 3, D, C): GPT-NeoX packs query, key and value head by head
            packed = ours.qkv.weight.view(3, 4, 16, 64).transpose(0, 1).reshape(192, 64)
            layer.attention.query_key_value.weight.copy_(packed)
            layer.attention.dense.weight.copy_(ours.attention_out.weight)
            layer.mlp.dense_h_to_4h.weight.copy_(ours.mlp_in.weight)
            layer.mlp.dense_4h_to_h.weight.copy_(ours.mlp_out.weight)
        theirs.lm_head.weight = theirs.gpt_neox.embed_in.weight
    return theirs


def logits_of(theirs: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return theirs(x).logits[..., : VOCAB - 1]


@pytest.mark.parametrize(
    ("scaling", "keys"),
    [
        ("none", {"rope_type": "default"}),
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("dynamic_ntk", {"rope_type": "dynamic", "factor": 2.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH}),
    ],
)
def test_rope_models_equal_gpt_neox_of_transformers(scaling: str, keys: dict[str, object]) -> None:
    """Scores far past the training length, under every scaling that transformers has too."""
    chosen = NONE if scaling == "none" else method("scaling", scaling, factor=keys["factor"])
    model = gpt("rope", chosen)
    theirs = as_gpt_neox(model, {"rope_theta": 1e4, "partial_rotary_factor": 1.0, **keys})
    x = tokens(4 * LENGTH)
    ours = scores(model, x)
    assert ours.std() > 0.9  # logits of a size at which a wrong angle shows
    torch.testing.assert_close(ours, logits_of(theirs, x), rtol=1e-3, atol=2e-3)


def test_alibi_models_equal_mpt_of_transformers() -> None:
    from transformers import MptConfig, MptForCausalLM

    model = gpt("alibi")
    theirs = MptForCausalLM(
        MptConfig(d_model=64, n_heads=4, n_layers=3, vocab_size=VOCAB, max_seq_len=4 * LENGTH, no_bias=True)
    ).eval()  # fmt: skip
    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(model.tokens.weight)
        theirs.transformer.norm_f.weight.copy_(model.norm_out.weight)
        for ours, layer in zip(model.blocks, theirs.transformer.blocks, strict=True):
            layer.norm_1.weight.copy_(ours.norm_attention.weight)
            layer.norm_2.weight.copy_(ours.norm_mlp.weight)
            layer.attn.Wqkv.weight.copy_(ours.qkv.weight)
            layer.attn.out_proj.weight.copy_(ours.attention_out.weight)
            layer.ffn.up_proj.weight.copy_(ours.mlp_in.weight)
            layer.ffn.down_proj.weight.copy_(ours.mlp_out.weight)
        theirs.lm_head.weight = theirs.transformer.wte.weight
    x = tokens(4 * LENGTH)
    torch.testing.assert_close(scores(model, x), logits_of(theirs, x), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("pos", ["learned", "sinusoidal"])
def test_absolute_models_equal_gpt2_of_transformers(pos: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = gpt(pos)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=64, n_layer=3, n_head=4, activation_function="gelu")
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
        embedding = model.encoding(torch.arange(LENGTH), ctx=LENGTH).embedding
        theirs.transformer.wpe.weight.copy_(embedding)
        theirs.transformer.wte.weight.copy_(model.tokens.weight)
        theirs.transformer.ln_f.weight.copy_(model.norm_out.weight)
        for ours, layer in zip(model.blocks, theirs.transformer.h, strict=True):
            layer.ln_1.weight.copy_(ours.norm_attention.weight)
            layer.ln_2.weight.copy_(ours.norm_mlp.weight)
            layer.attn.c_attn.weight.copy_(ours.qkv.weight.T)
            layer.attn.c_proj.weight.copy_(ours.attention_out.weight.T)
            layer.mlp.c_fc.weight.copy_(ours.mlp_in.weight.T)
            layer.mlp.c_proj.weight.copy_(ours.mlp_out.weight.T)
    torch.testing.assert_close(scores(model, tokens()), logits_of(theirs, tokens()), rtol=1e-3, atol=2e-3)


def test_layouts_agree_after_the_permutation_of_the_rows() -> None:
    """An interleaved model whose q and k rows are permuted is a half-split model (and without it, it is not)."""
    half, interleaved = gpt("rope"), gpt("rope", layout="interleaved")
    before = scores(interleaved, tokens())
    order = torch.stack((torch.arange(8), torch.arange(8) + 8), dim=1).flatten()  # 0, 8, 1, 9, ...
    with torch.no_grad():
        for block in interleaved.blocks:
            rows = block.qkv.weight.view(3, 4, 16, 64)
            rows[:2] = rows[:2][:, :, order].clone()
    torch.testing.assert_close(scores(interleaved, tokens()), scores(half, tokens()), rtol=1e-4, atol=1e-4)
    assert (before - scores(half, tokens())).abs().max() > 0.1


def test_rotation_turns_pairs_by_their_angle() -> None:
    """Complex multiplication by exp(i angle), pair by pair; what is not rotated passes unchanged."""
    x = torch.randn(1, 1, 5, 10, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) * 6
    turned = rotate(x, angles.cos(), angles.sin(), interleaved=True)
    expected = torch.view_as_complex(x[..., :6].reshape(1, 1, 5, 3, 2)) * torch.polar(torch.ones(5, 3), angles)
    torch.testing.assert_close(turned[..., :6], torch.view_as_real(expected).flatten(-2))
    assert torch.equal(turned[..., 6:], x[..., 6:])


def test_scores_of_rope_depend_on_distance_only() -> None:
    """Shifting all positions by a constant leaves the logits as they are."""
    model = gpt("rope")
    x = tokens()
    record = model.encoding(torch.arange(LENGTH) + 1000, ctx=LENGTH)
    prepared = model.prepare(LENGTH)
    model._prepared = (model._prepared[0], prepared._replace(record=record))  # type: ignore[index]
    shifted = scores(model, x)
    model._prepared = None
    torch.testing.assert_close(shifted, scores(model, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pos", ["none", "sinusoidal", "learned", "alibi", "rope"])
@pytest.mark.parametrize("training", [False, True])
def test_no_token_sees_the_future(pos: str, training: bool) -> None:
    """Gradient of the loss at t with respect to later token embeddings is exactly zero, to earlier ones it is not."""
    model = gpt(pos).train(training)
    table = model.tokens.weight
    x = torch.arange(LENGTH)[None]
    hidden = model(x)
    (gradient,) = torch.autograd.grad(hidden[0, 10].sum(), table)
    assert gradient[11:LENGTH].abs().max() == 0
    assert gradient[:11].abs().min(dim=1).values.max() > 0
    assert gradient[3].abs().max() > 0


def test_other_tensors_start_the_same_whatever_the_encoding() -> None:
    """Every tensor is drawn by (seed, name): a position table shifts no other draw; another seed changes all."""
    config = ModelConfig("test", n_layer=2, d_model=32, n_head=4, qk_norm=False)
    build_one = lambda pos, seed: GPT(config, 50, build(method("pos", pos), NONE, Geometry(32, 4, 16)), seed=seed)  # noqa: E731
    rope, learned, other = build_one("rope", 0), build_one("learned", 0), build_one("rope", 1)
    weights = dict(learned.named_parameters())
    for name, parameter in rope.named_parameters():
        assert torch.equal(parameter, weights[name])
        if parameter.dim() >= 2:
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
    assert learned.encoding.table.std().item() == pytest.approx(0.02, rel=0.1)
    assert rope.blocks[0].mlp_out.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)


def test_the_separator_is_never_predicted() -> None:
    """The softmax runs over V - 1 tokens; a separator as target costs nothing."""
    model = gpt("rope")
    x = tokens()
    hidden = model(x)
    targets = x.roll(-1, 1)
    targets[0, 0] = VOCAB - 1
    losses = model.nll(hidden, targets)
    assert losses[0, 0] == 0
    wide = torch.log_softmax(model.logits(hidden).double(), dim=-1)
    assert wide.shape[-1] == VOCAB - 1
    assert losses[1, 5].item() == pytest.approx(-wide[1, 5, targets[1, 5]].item(), rel=1e-5)


def test_a_padded_head_gives_the_same_losses_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the vocabulary is padded for the product: the padding is in no softmax and has no gradient."""
    net = gpt("rope")
    hidden = torch.randn(3, 7, net.config.d_model, requires_grad=True)
    targets = torch.randint(0, VOCAB - 1, (3, 7))
    plain = net.nll(hidden, targets)
    wanted = torch.autograd.grad(plain.sum(), (hidden, net.tokens.weight))
    monkeypatch.setitem(model.ALIGNED, "cpu", 7)
    assert (VOCAB - 1) % 7
    assert net.logits(hidden).shape[-1] == VOCAB - 1
    padded = net.nll(hidden, targets)
    torch.testing.assert_close(padded, plain)
    for got, want in zip(torch.autograd.grad(padded.sum(), (hidden, net.tokens.weight)), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_loss_in_parts_is_the_whole_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, against torch's own cross entropy over all scores at once; parts that do not divide N."""
    net = gpt("rope")
    hidden = torch.randn(3, 7, net.config.d_model, requires_grad=True)
    targets = torch.randint(0, VOCAB - 1, (3, 7))
    scored = hidden @ net.tokens.weight[:-1].T
    whole = torch.nn.functional.cross_entropy(scored.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    wanted = torch.autograd.grad(whole.square().sum(), (hidden, net.tokens.weight))
    held: list[int] = []
    plain = net.logits
    monkeypatch.setattr(model, "logits_held", lambda device, training: 4 * VOCAB)
    monkeypatch.setattr(net, "logits", lambda x: (held.append(len(x)), plain(x))[1])
    parts = net.nll(hidden, targets)
    torch.testing.assert_close(parts, whole)
    found = torch.autograd.grad(parts.square().sum(), (hidden, net.tokens.weight))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert len(held) == 2 * 6  # in the backward pass again
    assert max(held) == 4
    with torch.no_grad():
        torch.testing.assert_close(net.nll(hidden, targets), whole)


def test_qk_norm_changes_the_model() -> None:
    plain, normed = gpt("rope"), gpt("rope", qk_norm=True)
    assert normed.n_parameters() - plain.n_parameters() == 3 * 2 * 16
    assert not torch.allclose(scores(plain, tokens()), scores(normed, tokens()))


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 820_480), ("small", 12_194_688)])
def test_sizes_are_the_documented_ones(name: str, parameters: int) -> None:
    """Weights by hand: 12 C^2 a layer, the table, and 2 norms a layer and one at the end."""
    from ropelab.config import load

    config = load([f"model={name}"]).model
    vocab = 257 if name == "tiny" else 4096
    width = config.d_model
    model = GPT(config, vocab, build(method("pos", "rope"), NONE, Geometry(width, config.n_head, 128)), seed=0)
    by_hand = config.n_layer * (12 * width**2 + 2 * width) + vocab * width + width
    assert model.n_parameters() == by_hand
    assert model.n_parameters() == parameters
