"""Our attention in the layers of a loaded model: for what changes scores and masks, and not the angles alone.

transformers hands queries and keys, turned already, to an attention function that is chosen by name. Ours takes that
place. A layer whose far keys have a second score makes its queries and keys once more for each of the other positions,
by its own forward, with the angles that its own rotary module gives there: the layout of pairs, norms, shared keys and
latent attention are the model's. B sequences, H heads, T tokens, D head dimension.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropelab.attention import Attend, Bias
from ropelab.huggingface import checkpoint, rotary
from ropelab.positions import Positions

NAME = "ropelab"
PROBE = 48  # tokens, where the model takes so many, of the text on which our attention has to be the model's own
LAYERS = "ropelab_layers"  # the attribute of an attention module that holds the `Layers` of its model


def handed_over(model: nn.Module) -> bool:
    """Does this model let its attention be replaced?"""
    return bool(getattr(model, "_supports_attention_backend", False))


class Layers:
    """The attention of all layers of a loaded model. `ValueError` where ours would not be the model's own."""

    def __init__(self, model: Any, turns: rotary.Rotary | None) -> None:
        self._model, self._rotary = model, turns
        self._change = Positions()  # what is said of scores and masks
        self._window: int | None = None
        self._near: list[Any] = []  # what the scaled rotary modules returned in this pass
        self._far: list[tuple[Any, Any]] = []  # the same at the positions of far queries and of far keys
        self._taken: list[Tensor] | None = None  # where queries and keys go in a pass for them alone
        self._exempt = False  # of the layer at hand: is no scaling for it?
        self._second: tuple[Tensor, Tensor] | None = None  # of the layer at hand: queries and keys of the far score
        self._reached = 0  # layers that the change had an effect on: far scores had other queries than near ones
        self._attends: dict[tuple[int, bool, Bias], Attend] = {}
        self._hooks: list[Any] = []
        self._modules: list[nn.Module] = []
        self._install()

    @torch.no_grad()
    def _install(self) -> None:
        text = self._model.config.get_text_config()
        length = min(PROBE, checkpoint.longest_trained(self._model.config) or PROBE)
        tokens = torch.arange(length, device=self._model.device)[None] * 7 % text.vocab_size  # (1, T)
        own = self._model(input_ids=tokens, use_cache=False).logits.float()
        for module in self._model.modules():
            setattr(module, LAYERS, self)
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
        with checkpoint.quiet():
            self._model.set_attn_implementation(NAME)
        got = self._model(input_ids=tokens, use_cache=False).logits.float()
        exact = self._model.dtype == torch.float32
        off = float((got - own).abs().max() / own.abs().max())
        if not self._modules or not off < (1e-4 if exact else 5e-2):
            raise ValueError(
                f"{type(self._model).__name__} does more in its attention than ropelab's knows of (logits differ by "
                f"{off:.1g}); leave out eval.window and scalings of attention"
            )
        for module in self._modules:
            if "position_embeddings" in inspect.signature(module.forward).parameters:
                module.forward = self._again(module.forward)

    def set(self, said: Positions, window: int | None) -> None:
        """What the scores and masks of the layers are from now on; what `said` says of embedding and bias is not."""
        for hook in self._hooks:
            hook.remove()
        device = self._model.device
        scale = None if said.logit_scale is None else said.logit_scale.to(device)
        self._change, self._window = said._replace(logit_scale=scale), window
        self._attends = {}
        self._hooks = []
        if self._rotary is not None:
            for handle, module in self._rotary.scaled():
                hook = functools.partial(self._turn, handle)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def watched(self) -> Callable[[], None]:
        """Watch the layers in the next pass; what is returned checks that what was said reached them."""
        self._reached = 0

        def end() -> None:
            said = self._change
            if (said.far, said.block, said.logit_scale) != (None, None, None) and not self._reached:
                raise self._unknown()

        return end

    def _unknown(self) -> ValueError:
        return ValueError(
            f"the layers of {type(self._model).__name__} take their angles in a way that ropelab does not know; leave "
            "out eval.window and scalings of attention"
        )

    # --- angles -----------------------------------------------------------------------------------------------------

    def _turn(self, handle: rotary.Handle, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """A hook of a rotary module: keep what it returns, and ask it for the angles of far queries and keys."""
        if not rotary.concerns(handle, args, kwargs):
            return
        if len(self._near) >= len(self._hooks):  # the pass before
            self._near, self._far = [], []
        self._near.append(out)
        far = self._change.far
        if far is None:
            return
        turned = []
        for at, cos, sin in (
            (far.query_at, far.rotation.cos_q, far.rotation.sin_q),
            (far.key_at, far.rotation.cos_k, far.rotation.sin_k),
        ):
            there = rotary.angles_at(module, args, kwargs, at)
            rounded = not isinstance(there, Tensor) and there[0].dtype != torch.float32
            read = rotary.turns(there, len(getattr(module, f"{handle.prefix}inv_freq")), module)
            _check_turned(read, cos, sin, at, rounded=rounded)
            turned.append(there)
        self._far.append((turned[0], turned[1]))

    def _again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of an attention module, which makes queries and keys for far keys first."""
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def made(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            angles = given.arguments.get("position_embeddings")
            if angles is None or self._rotary is None:
                return forward(*args, **kwargs)
            number = next((n for n, near in enumerate(self._near) if _same(near, angles)), None)
            if number is None and not self._rotary.label:
                raise self._unknown()
            self._exempt = number is None  # the angles of another type of layers, which no scaling is for
            if number is not None and self._change.far is not None:
                self._taken = []
                for there in self._far[number]:
                    given.arguments["position_embeddings"] = there
                    forward(*given.args, **given.kwargs)
                query, _, _, key = self._taken
                self._taken, self._second = None, (query, key)
            try:
                return forward(*args, **kwargs)
            finally:
                self._exempt, self._second = False, None

        return made

    # --- scores -----------------------------------------------------------------------------------------------------

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None,
        cap: float | None,
    ) -> Tensor:
        """query (B, H, T, D), key (B, K, T, D), value (B, K, T, E), K dividing H -> (B, T, H, E)."""
        if module not in self._modules:
            self._modules.append(module)
        length, heads = query.shape[2], query.shape[1]
        if self._taken is not None:
            self._taken += [query, key]
            return value.new_zeros(len(value), length, heads, value.shape[-1])
        if mask is None:
            raise ValueError(
                f"{type(module).__name__} makes no mask that ropelab knows; leave out what changes attention"
            )
        local = int(mask.flatten()[0])  # written by `_mask`; 0: none
        windows = [size for size in (local, self._window) if size]
        said = Positions() if self._exempt else self._change
        second = self._second
        if not self._exempt:
            self._reached += said.far is None if second is None else not torch.equal(second[0], query)
        bias = Bias(
            window=min(windows, default=None),
            block=said.block,
            far=None if second is None or said.far is None else said.far.window,
            scale=said.logit_scale,
            cap=cap,
        )
        place = (length, self._exempt, bias._replace(scale=None))
        if place not in self._attends:
            self._attends[place] = Attend(length, bias=bias, device=query.device, training=False, dtype=query.dtype)
        factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])  # ours divides by sqrt(D)

        def scaled(q: Tensor) -> Tensor:
            return q if abs(factor - 1) < 1e-6 else q * factor

        def shared(x: Tensor) -> Tensor:  # (B, K, T, D) -> (B, H, T, D)
            return x.repeat_interleave(heads // x.shape[1], dim=1)

        far = None if second is None else (scaled(second[0]), shared(second[1]))
        out = self._attends[place](scaled(query), shared(key), shared(value), far=far)  # (B, H, T, E)
        return out.transpose(1, 2).contiguous()


def _same(near: Any, angles: Any) -> bool:
    """Are these the angles that a rotary module returned, and not those of another one?"""
    if isinstance(near, Tensor) or isinstance(angles, Tensor):
        return near is angles
    return near[0] is angles[0]


def _check_turned(read: rotary.Turns, cos: Tensor, sin: Tensor, at: Tensor, *, rounded: bool) -> None:
    """The angles of a rotary module at the positions `at` (N,) are those of our formula: cos, sin (N, R/2) fp32."""
    off = max(float((one.cpu() - due).abs().max()) for one, due in zip(read, (cos, sin), strict=True))
    # fp32 rounds the product of position and frequency, up to `at` radians, and bf16 the cosine
    if off > 2e-6 + 5e-7 * float(at.max()) + (2**-8 if rounded else 0):
        raise ValueError(f"far keys are not turned as they should be: a cosine or sine is off by {off:.2g}")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer."""
    for name, given in rest.items():
        if isinstance(given, Tensor) and given.is_floating_point():
            raise ValueError(
                f"{type(module).__name__} takes {name} into its softmax, which ropelab's attention does not; leave out "
                "eval.window and scalings of attention"
            )
    layers: Layers = getattr(module, LAYERS)
    return layers.attend(module, query, key, value, attention_mask, scaling=scaling, cap=softcap), None


def _mask(
    *args: Any, kv_length: int, mask_function: Callable[..., Tensor], local_size: int | None = None, **rest: Any
) -> Tensor:
    """What transformers calls once a type of layers: not a mask, but the window that it comes to, (1, 1, 1, 1) int64.

    `ValueError` for a mask that is neither causal nor causal in a window.
    """
    window = local_size or kv_length
    edge = {0, 1, window - 1, window, window + 1, kv_length // 2, kv_length - 1}
    queries = sorted(n for n in edge if 0 <= n < kv_length)
    pairs = [(i, j) for i in queries for d in (*queries, i - 1, i + 1, i + 2) for j in (d, i - d) if 0 <= j < kv_length]
    i, j = (torch.tensor(part) for part in zip(*pairs, strict=True))  # (N,)
    seen = mask_function(torch.zeros_like(i), torch.zeros_like(i), i, j).expand(len(pairs))
    if not torch.equal(seen, (j <= i) & (i - j < window)):
        raise ValueError(
            "this model hides keys in a way that ropelab's attention does not know; leave out eval.window and scalings "
            "of attention"
        )
    return torch.full((1, 1, 1, 1), local_size or 0)
