"""RoPE: rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions, Rotation, Spectrum


class Rope(PositionEncoding):
    """Su et al. 2021 (2104.09864), section 3.2: pair i of a query or key at position p is turned by p base^(-2i/R).

    `layout=half` pairs dimension i with i + R/2 (GPT-NeoX, Llama in transformers), `interleaved` 2i with 2i + 1
    (the paper, GPT-J). `fraction` rotates the first R = fraction x d_head dimensions only, with the frequencies
    spread over R (GPT-NeoX `rotary_pct`). Angles are computed in fp64 and stored in fp32.
    """

    name = "rope"

    any_positions = True

    def __init__(self, geometry: Geometry, *, base: float, layout: str, fraction: float) -> None:
        super().__init__()
        if not base > 1:
            raise ValueError(f"pos.base must be > 1, not {base}")
        if layout not in ("half", "interleaved"):
            raise ValueError(f"pos.layout must be half or interleaved, not '{layout}'")
        if not 0 < fraction <= 1:
            raise ValueError(f"pos.fraction must be in (0, 1], not {fraction}")
        if geometry.d_head % 2:
            raise ValueError(
                f"rope needs an even head dimension, not {geometry.d_head}: "
                f"change model.d_model={geometry.d_model} or model.n_head={geometry.n_head}"
            )
        self.rotated = int(geometry.d_head * fraction) // 2 * 2  # R
        if self.rotated == 0:
            raise ValueError(f"pos.fraction={fraction} of a head dimension of {geometry.d_head} rotates no pair")
        self.base = base
        self.fraction = fraction
        self.interleaved = layout == "interleaved"

    def inv_freq(self) -> Tensor:
        """The spectrum as trained: radians per token of every pair, (R/2,) fp64, fastest first."""
        exponents = torch.arange(0, self.rotated, 2, dtype=torch.float64) / self.rotated
        return self.base**-exponents

    def spectrum(self, ctx: int) -> Spectrum:
        """The spectrum in use in a sequence of `ctx` tokens, with its attention factor and unscaled start tokens."""
        plain = self.inv_freq()
        return Spectrum(plain) if self.scaling is None else self.scaling.spectrum(plain, base=self.base, ctx=ctx)

    def angles(self, positions: Tensor, used: Spectrum) -> Tensor:
        """Angles of all pairs at positions (N,) int64 under a spectrum: (N, R/2) fp64 radians, on the CPU."""
        at = positions.cpu().double()[:, None]  # (N, 1)
        if used.start_tokens == 0:
            return at * used.inv_freq
        return torch.where(at < used.start_tokens, at * self.inv_freq(), at * used.inv_freq)

    def rotation(self, positions: Tensor, used: Spectrum) -> Rotation:
        """The same rotation for queries and keys at positions (N,) int64 under a spectrum."""
        angles = self.angles(positions, used)  # (N, R/2) fp64
        cos = (angles.cos() * used.attention_factor).float().to(positions.device)
        sin = (angles.sin() * used.attention_factor).float().to(positions.device)
        return Rotation(cos, sin, cos, sin, self.interleaved)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(rotation=self.rotation(positions, self.spectrum(ctx)))
