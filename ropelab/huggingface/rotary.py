"""Rotary parameters in transformers' words, and the rotary modules of a loaded model: set, and read back.

transformers 5 says `rope_parameters`, one dict or one a layer type; 4.x says `rope_theta` and `rope_scaling`. A loaded
model turns its queries and keys by modules that hold `inv_freq` and `attention_scaling`, whatever its layout of pairs:
any spectrum is applied by writing these two, and read back from the cosines and sines that the module returns.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ropelab import config as configs
from ropelab.config import Method
from ropelab.positions import Rope, Spectrum
from ropelab.scalings import HfRope, make_scaling, proportional_rope

OTHER_MODALITIES = ("vision", "visual", "audio", "speech")
LOCAL = ("sliding", "local", "chunked")  # layers that see a window only: a scaling leaves them as they were trained
# keys of rotary parameters that are a scaling's; others are the model's own, such as a temperature of its queries
OF_SCALING = (
    "rope_type", "type", "factor", "alpha", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow",
    "truncate", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "short_mscale", "long_mscale",
)  # fmt: skip
BASES = ("rope_theta", "rotary_emb_base", "rotary_base", "rope_base", "base_freq", "rope_freq_base")  # parts of keys
SHARES = ("partial_rotary_factor", "rotary_pct", "rotary_percentage", "rope_pct")
ORIGINAL = "original_max_position_embeddings"
DIMENSIONS = ("rotary_dim", "rotary_ndims", "qk_rope_head_dim")


# --- configurations -------------------------------------------------------------------------------------------------


def walk(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number, string, truth and null of a JSON value, and the keys that lead to it; those of a list have none."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        where, found = waiting.pop()
        if isinstance(found, dict):
            waiting += [((*where, str(key)), inner) for key, inner in reversed(found.items())]
        elif isinstance(found, list):
            waiting += [(where, inner) for inner in reversed(found)]
        else:
            yield where, found


def declared(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters of a configuration by layer type ("" where all layers are alike), in transformers 5's words."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None)
    if found:
        if all(value is None or isinstance(value, Mapping) for value in found.values()):
            return {label: dict(value) for label, value in found.items() if value}
        return {"": dict(found)}
    base = getattr(text, "rope_theta", None) or getattr(text, "rotary_emb_base", None)
    if base is None:
        return {}
    scaling = dict(getattr(text, "rope_scaling", None) or {})
    share = getattr(text, "partial_rotary_factor", None) or getattr(text, "rotary_pct", None) or 1.0
    kind = scaling.pop("type", "default")
    one = {"rope_theta": base, "partial_rotary_factor": share, "rope_type": kind, **scaling}
    original = getattr(text, "original_max_position_embeddings", None)
    if original is not None:
        one["original_max_position_embeddings"] = original
    local = getattr(text, "rope_local_base_freq", None)
    if local is None:
        return {"": one}
    return {"full_attention": one, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def scaled_label(labels: Mapping[str, Any]) -> str:
    """The layer type that a scaling is for: the one that sees all of the text."""
    return next((label for label in labels if not any(word in label for word in LOCAL)), next(iter(labels)))


def without_scaling(config: Any) -> Any:
    """A copy of a configuration whose scaled layers turn as they did before any scaling."""
    plain = copy.deepcopy(config)
    text = plain.get_text_config()
    labels = declared(config)
    label = scaled_label(labels)
    kept = {key: value for key, value in labels[label].items() if key not in OF_SCALING}
    if labels[label].get("rope_type") == "proportional":  # how p-RoPE is trained, not a scaling
        kept = {**kept, "rope_type": "proportional"}
    else:
        kept["rope_type"] = "default"
    if getattr(text, "rope_parameters", None):
        text.rope_parameters = {**labels, label: kept} if label else kept
    else:
        text.rope_scaling = None
    return plain


def encoding_of(parameters: Mapping[str, Any], *, pairs: int, d_head: int) -> Method:
    """The encoding that a checkpoint was trained with: RoPE, or p-RoPE where its pairs are `proportional`."""
    fraction = 2 * pairs / d_head
    if int(d_head * fraction) < 2 * pairs:  # the product is rounded
        fraction = math.nextafter(fraction, 2)
    base = float(parameters["rope_theta"])
    if not 1 < base < math.inf:
        raise ValueError(f"rope_theta in config.json must be above 1, not {base:g}")
    rope = {"base": base, "layout": "half"}
    if parameters.get("rope_type") == "proportional":
        return Method("p_rope", {**rope, "p": float(parameters.get("partial_rotary_factor", 1.0))})
    return Method("rope", {**rope, "fraction": fraction})


def check_base(parameters: Mapping[str, Any]) -> None:
    """`ValueError` for a base of which no frequency can be made."""
    for base in _floats(parameters.get("rope_theta")):
        if not 0 < base < math.inf:
            raise ValueError(f"rope_theta in config.json must be above 1, not {base:g}")


def stated_base(parameters: Mapping[str, Any]) -> float | None:
    """The base that rotary parameters state, where it is one that an encoding of ours can have."""
    (base, *_) = [*_floats(parameters.get("rope_theta")), 0.0]
    return base if 1 < base < math.inf else None


def scaling_of(parameters: Mapping[str, Any], max_ctx: int | None) -> Method:
    """The scaling that rotary parameters ask for, as one of ours; `max_ctx`: max_position_embeddings.

    `ValueError` for a type that is none of ours.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    factor = parameters.get("factor")
    original = parameters.get("original_max_position_embeddings")
    if factor is None and original and max_ctx:
        factor = max_ctx / original
    factor = float(factor or 1.0)
    if kind == "default" or (kind == "proportional" and factor == 1):
        return Method("none", {})
    if kind in ("linear", "proportional"):
        return _with_defaults("linear", factor=factor)
    if kind == "dynamic":
        return _with_defaults("dynamic_ntk", factor=factor, original_ctx=max_ctx)
    if kind == "llama3":
        keys = ("low_freq_factor", "high_freq_factor")
        return _with_defaults(
            "llama3", factor=factor, original_ctx=original, **{key: float(parameters[key]) for key in keys}
        )
    if kind == "yarn":
        return _with_defaults(
            "yarn", factor=factor, original_ctx=original,
            beta_fast=float(parameters.get("beta_fast") or 32), beta_slow=float(parameters.get("beta_slow") or 1),
            truncate=parameters.get("truncate", True), attention_factor=_yarn_attention(parameters, factor),
        )  # fmt: skip
    if kind in ("longrope", "su"):
        return _with_defaults(
            "longrope", factor=max(factor, 1.0), original_ctx=original,
            long_factors=[float(x) for x in parameters["long_factor"]],
            short_factors=[float(x) for x in parameters["short_factor"]],
            attention_factor=parameters.get("attention_factor"),
        )  # fmt: skip
    raise ValueError(
        f"the checkpoint's rotary type '{kind}' is none that ropelab knows; --scaling none evaluates it without"
    )


def _with_defaults(name: str, **given: Any) -> Method:
    """A scaling with the defaults of its YAML where nothing is given."""
    defaults = configs.load([f"scaling={name}"]).scaling.parameters
    return Method(name, {**defaults, **given})


def _yarn_attention(parameters: Mapping[str, Any], factor: float) -> float | None:
    """transformers' attention factor: given, or of DeepSeek's two temperatures; None: YaRN's."""
    given = parameters.get("attention_factor")
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if given is not None or not (mscale and mscale_all):
        return None if given is None else float(given)
    if factor <= 1:
        return 1.0
    return float(0.1 * mscale * math.log(factor) + 1) / float(0.1 * mscale_all * math.log(factor) + 1)


def unheeded(raw: Any, labels: Mapping[str, Mapping[str, Any]], turned: Sequence[Plain], d_head: int) -> list[str]:
    """The rotary numbers of config.json, wherever they stand, that a loaded model does not turn by, each in a line.

    labels: its parameters as transformers has them. turned: what its rotary modules turn by.
    """
    lines = []
    bases = {base for one in turned for base in one.bases}
    numbers: dict[str, set[float]] = {}
    for parameters in labels.values():
        for key, value in parameters.items():
            numbers.setdefault(key, set()).update(_floats(value))

    def say(where: tuple[str, ...], value: float, found: Iterable[float]) -> None:
        known = ", ".join(f"{number:.6g}" for number in sorted(found)) or "none"
        lines.append(
            f"config.json says {'.'.join(where)} = {value:.6g}; the model as transformers loads it has {known}"
        )

    for where, value in walk(raw):
        if not where or any(word in part for word in OTHER_MODALITIES for part in where) or not _floats(value):
            continue
        key, (number,) = where[-1], _floats(value)
        if any(part in key for part in BASES):
            if number and not any(math.isclose(number, base, rel_tol=1e-4) for base in bases):
                say(where, number, {float(f"{one.bases[0]:.5g}") for one in turned if one.bases})
        elif key in SHARES or key in DIMENSIONS:
            due = number * d_head if key in SHARES else number
            proportional = any(one.get("rope_type") == "proportional" for one in labels.values())
            if number and not proportional and not any(abs(2 * one.pairs - due) < 2 for one in turned):
                say(where, number, {2 * one.pairs / (d_head if key in SHARES else 1) for one in turned})
        elif any(part.startswith("rope_") for part in where[:-1]) and key in (*OF_SCALING, ORIGINAL):
            known = numbers.get(key, set())
            if not any(math.isclose(number, other) for other in known):
                say(where, number, known)
    return lines


def _floats(value: Any) -> list[float]:
    """The numbers in a value, or in a list."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _floats(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


class Plain(NamedTuple):
    """What a rotary module turns by, as far as its frequencies say it."""

    bases: tuple[float, ...]  # that they may come from: an odd dimension has as many pairs as the next even one
    pairs: int


def to_hf_rope(encoding: Rope, pos: Method, scaling: Method, *, original_ctx: int, max_ctx: int | None) -> HfRope:
    """A rotary encoding under a scaling (its factor a number) in transformers' words.

    `max_ctx`: the longest text that the model is said to hold; None: original_ctx times the factor. `ValueError` with
    the reason where transformers has no word for it.
    """
    if pos.name == "p_rope":
        if scaling.name not in ("none", "linear"):
            raise ValueError(
                f"scaling={scaling.name} on p-RoPE: transformers' `proportional` knows only a linear factor"
            )
        factor = scaling.parameters.get("factor", 1.0)
        reach = max_ctx or math.ceil((scaling.parameters.get("original_ctx") or original_ctx) * factor)
        return HfRope(encoding.base, proportional_rope(pos.parameters["p"], factor), reach)
    if scaling.name == "none":
        return HfRope(encoding.base, {"rope_type": "default"}, max_ctx or original_ctx)
    return make_scaling(scaling, original_ctx).to_hf_rope(encoding, max_ctx=max_ctx)


# --- a loaded model -------------------------------------------------------------------------------------------------


class Handle(NamedTuple):
    """One spectrum of a loaded model."""

    path: str  # of its module
    prefix: str  # of its attributes: "", or the layer type and an underscore
    label: str  # layer type, "" where all are alike


def handles(model: nn.Module, labels: Mapping[str, Any]) -> list[Handle]:
    """The spectra of a model whose configuration declares rotary parameters for `labels`."""
    found = []
    for path, module in model.named_modules():
        if any(word in path for word in OTHER_MODALITIES):
            continue
        for name in module._buffers:
            prefix = name.removesuffix("inv_freq")
            if name == prefix or prefix.endswith(("original_", "long_", "short_")):
                continue
            label = prefix.removesuffix("_")
            if not label and "" not in labels and labels:  # transformers 4: a module for each
                local = any(word in path for word in LOCAL)
                label = next((key for key in labels if any(word in key for word in LOCAL) == local), "")
            found.append(Handle(path, prefix, label))
    return found


class Turns(NamedTuple):
    """What a rotary module returns for positions 0 .. T-1: cosines and sines with the attention factor, (T, R/2)."""

    cos: Tensor
    sin: Tensor

    def spectrum(self) -> Spectrum:
        """The frequencies and the attention factor that they come from; positions 0 and 1 say it all."""
        factor = self.cos[0, 0].double().item()
        inv_freq = torch.atan2(self.sin[1].double(), self.cos[1].double())
        return Spectrum(inv_freq.cpu(), factor)


class Rotary:
    """The rotary modules of a loaded model."""

    def __init__(self, model: Any, labels: Mapping[str, Any]) -> None:
        self._model, self._labels = model, labels
        self.handles = handles(model, labels)
        self.label = scaled_label(labels)
        self._pristine = {path: copy.deepcopy(model.get_submodule(path)) for path in {h.path for h in self.handles}}
        self._calls: dict[tuple[str, str], tuple[Tensor, ...]] = {}

    def scaled(self) -> Iterator[tuple[Handle, nn.Module]]:
        """The modules of the layers that a scaling is for."""
        for handle in self.handles:
            if handle.label == self.label:
                yield handle, self._model.get_submodule(handle.path)

    def reset(self) -> None:
        """The modules as they were loaded: `dynamic` remembers the longest text that it has seen."""
        for path, module in self._pristine.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, copy.deepcopy(module))

    def set(self, spectrum: Spectrum, plain: Tensor) -> None:
        """Turn by another spectrum from now on; `plain` (R/2,) fp64 is the one of the first start tokens."""
        self.reset()
        for handle, module in self.scaled():
            buffer = getattr(module, f"{handle.prefix}inv_freq")
            buffer.copy_(spectrum.inv_freq)
            name = f"{handle.prefix}attention_scaling"
            if not hasattr(module, name) and spectrum.attention_factor != 1:
                raise ValueError(f"{type(module).__name__} has no attention factor; use a scaling without one")
            setattr(module, name, spectrum.attention_factor)
            if spectrum.start_tokens:
                module.forward = _starting(module.forward, buffer, spectrum, plain, handle)

    def read(self, ctx: int) -> Turns:
        """What the scaled layers turn by in a text of `ctx` tokens. `ValueError` where two modules disagree."""
        read = [_read(module, handle, ctx) for handle, module in self.scaled()]
        if any(not torch.equal(read[0].cos, other.cos) for other in read[1:]):
            raise ValueError("the rotary modules of one layer type turn differently: no one spectrum says what they do")
        return read[0]

    def plain(self) -> list[Plain]:
        """What each module turns by; of layers under a scaling the base that transformers has."""
        found = []
        for handle in self.handles:
            stated = self._labels.get(handle.label, {})
            inv_freq = getattr(self._model.get_submodule(handle.path), f"{handle.prefix}inv_freq").double()
            pairs, bases = len(inv_freq), [float(stated.get("rope_theta") or 0)]
            turning = int(inv_freq.count_nonzero())
            if stated.get("rope_type", "default") in ("default", "proportional") and turning > 1:
                last = turning - 1  # inv_freq = base ** (-2 last / R)
                log = -float(inv_freq[last].log()) / (2 * last)
                bases = [math.exp(log * 2 * pairs), math.exp(log * (2 * pairs - 1))]
            found.append(Plain(tuple(bases), pairs))
        return found

    @torch.no_grad()
    def reached(self) -> list[bool] | None:
        """Which layers the rotation reaches: by layer, is its output another one without it, on the same input?

        None where the model has no list of layers. Of modules that nothing reads all are False.
        """
        layers = _layers_of(self._model)
        if layers is None:
            return None
        text = self._model.config.get_text_config()
        ids = torch.arange(PROBE, device=self._model.device)[None] * 7 % text.vocab_size  # (1, T)
        inputs: list[Tensor | None] = []
        first = self._outputs(layers, ids, inputs, fill=True)
        if len(inputs) != len(layers) or not all(isinstance(one, Tensor) for one in inputs):
            return None
        again = self._outputs(layers, ids, inputs)  # kernels of a GPU may differ in the last bit
        hooks = [
            module.register_forward_hook(functools.partial(_unturned, handle), with_kwargs=True)
            for handle, module in self.scaled()
        ]
        without = self._outputs(layers, ids, inputs)
        for hook in hooks:
            hook.remove()
        if not len(first) == len(again) == len(without) == len(layers):
            return None
        return [
            float((one - other).abs().max()) > 2 * float((one - same).abs().max())
            for one, same, other in zip(first, again, without, strict=True)
        ]

    def _outputs(
        self, layers: nn.ModuleList, ids: Tensor, inputs: list[Tensor | None], *, fill: bool = False
    ) -> list[Tensor]:
        """What each layer makes of its input in a pass; `inputs` are put in its place, or noted under `fill`."""
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if fill:
                given = args[0] if args else kwargs.get("hidden_states")
                inputs.append(given.clone() if isinstance(given, Tensor) else None)
                return None
            put = inputs[len(outputs)]
            return ((put, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": put})

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            outputs.append((out if isinstance(out, Tensor) else out[0]).float().clone())

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
        self._model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return outputs

    def watched(self) -> Callable[[], None]:
        """Watch the modules in the next forward pass; what is returned ends that, and checks that it used them.

        `ValueError` where the pass was made without what `read` had read.
        """
        hooks, seen = [], set[str]()
        for handle, module in self.scaled():

            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any, handle: Handle = handle) -> None:
                if concerns(handle, args, kwargs):
                    seen.add(handle.path)

            hooks.append(module.register_forward_hook(hook, with_kwargs=True))

        def end() -> None:
            for one in hooks:
                one.remove()
            if not seen:
                raise ValueError("the model made its pass without its rotary modules: no scaling can be applied to it")

        return end


PROBE = 16  # tokens


def _layers_of(model: Any) -> nn.ModuleList | None:
    """The layers of a model: of the lists of so many modules the one with the most weights."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)


def _unturned(handle: Handle, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    """A hook of a rotary module: what it returns for a rotation by nothing."""
    if not concerns(handle, args, kwargs):
        return None
    if isinstance(out, Tensor):
        return torch.ones_like(out)
    return (torch.ones_like(out[0]), torch.zeros_like(out[1]), *out[2:])


def concerns(handle: Handle, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Is this call of a rotary module, (x, position_ids[, layer_type]), for the layers of a handle?"""
    label = kwargs.get("layer_type", args[2] if len(args) > 2 else handle.label)
    return label == handle.label or not handle.prefix


def angles_at(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], at: Tensor) -> Any:
    """What a rotary module returns to the same call with the positions `at` (N,) int64 instead."""
    x = args[0] if args else kwargs["x"]
    rest = {key: value for key, value in kwargs.items() if key not in ("x", "position_ids")}
    return module.forward(x, at.to(x.device)[None], *args[2:], **rest)


def _starting(
    forward: Callable[..., Any], buffer: Tensor, spectrum: Spectrum, plain: Tensor, handle: Handle
) -> Callable[..., Any]:
    """A rotary module's forward whose first positions turn by the plain spectrum."""

    def both(x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> Any:
        if not concerns(handle, (x, position_ids, *rest), named):
            return forward(x, position_ids, *rest, **named)
        buffer.copy_(plain)
        first = forward(x, position_ids, *rest, **named)
        buffer.copy_(spectrum.inv_freq)
        later = forward(x, position_ids, *rest, **named)
        early = (position_ids < spectrum.start_tokens)[..., None]  # (B, T, 1)
        if isinstance(first, Tensor):
            return torch.where(early, first, later)
        return tuple(torch.where(early, one, other) for one, other in zip(first, later, strict=True))

    return both


@torch.no_grad()
def _read(module: nn.Module, handle: Handle, ctx: int) -> Turns:
    buffer = getattr(module, f"{handle.prefix}inv_freq")
    x = torch.zeros(1, 1, 1, device=buffer.device)  # fp32, whatever the weights are
    positions = torch.arange(ctx, device=buffer.device)[None]  # (1, T)
    out = module(x, positions, handle.label) if handle.prefix else module(x, positions)
    return turns(out, len(buffer), module)


def turns(out: Any, pairs: int, module: nn.Module) -> Turns:
    """What a rotary module returned, cosines and sines (1, T, R) in whatever form, a pair at a time."""
    cos, sin = (out.real, out.imag) if isinstance(out, Tensor) else out
    cos, sin = cos[0].float(), sin[0].float()  # (T, R/2), or (T, R) where a pair is there twice
    if cos.shape[-1] == 2 * pairs:
        halves = torch.equal(cos[:, :pairs], cos[:, pairs:])
        cos, sin = (cos[:, :pairs], sin[:, :pairs]) if halves else (cos[:, 0::2], sin[:, 0::2])
    if cos.shape[-1] != pairs:
        raise ValueError(
            f"{type(module).__name__} returns {cos.shape[-1]} angles for {pairs} pairs: its form is unknown"
        )
    return Turns(cos, sin)


def difference(read: Turns, encoding: Rope, ctx: int, *, relative: float) -> str | None:
    """How the turns of a loaded model differ from those that an encoding asks for; None where they do not.

    `relative`: the error of a frequency that fp32 explains.
    """
    asked = encoding.spectrum(ctx)
    found = read.spectrum()
    if abs(found.attention_factor - asked.attention_factor) > 1e-5:
        return f"its attention factor is {found.attention_factor:.6g} where {asked.attention_factor:.6g} is due"
    if read.cos.shape[1] != len(asked.inv_freq):
        return f"it turns {read.cos.shape[1]} pairs where {len(asked.inv_freq)} are due"
    angles = encoding.angles(torch.arange(ctx), asked)  # (T, R/2) fp64
    at = [0, 1, *(t for t in (ctx // 2, ctx - 1) if t > 1)]  # positions
    for position in at:
        due = angles[position]
        got = torch.stack((read.cos[position], read.sin[position])).double().cpu() / asked.attention_factor
        off = (got - torch.stack((due.cos(), due.sin()))).abs().amax(0)  # (R/2,)
        # fp32 rounds the frequency and its product with the position
        bad = off > relative * due.abs() + 2e-6
        if bool(bad.any()):
            pair = int(bad.nonzero()[0])
            return f"pair {pair} of position {position} is off by {off[pair]:.2g} in its cosine or sine"
    return None
