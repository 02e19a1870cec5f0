"""Sinusoidal embeddings: the paper's and fairseq's, added to the tokens or to what queries and keys are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions

RMS_OF_TABLE = math.sqrt(0.5)  # a row of sines and cosines has mean square 1/2


class FixedTable(PositionEncoding):
    """Base of the encodings whose vectors, one a position, are computed by a formula."""

    any_positions = True

    def __init__(self, geometry: Geometry, *, base: float) -> None:
        super().__init__()
        if geometry.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even model.d_model, not {geometry.d_model}")
        if not base > 1:
            raise ValueError(f"pos.base must be > 1, not {base}")
        self.d_model = geometry.d_model
        self.base = base  # the slowest wavelength is 2 pi base

    def table(self, positions: Tensor) -> Tensor:
        """The bare table, (T, C) fp32; angles in fp64."""
        raise NotImplementedError

    def unmet(self, ctx: int, trained: int) -> str | None:
        if ctx > trained and 2 * math.pi * self.base > trained:
            return "positions past training have vectors that the model never met"
        return None


class Sinusoidal(FixedTable):
    """Vaswani et al. 2017 (1706.03762), section 3.5: table[p, 2i] = sin(p base^(-2i/C)), table[p, 2i+1] = cos(...).

    The table is multiplied by one learned scalar, which starts where its rows have the root mean square of freshly
    drawn token embeddings (0.02): with the bare table (0.71) the text would be drowned at the start of training. The
    scalar is trained in the units of an embedding, so that it can grow as fast as the tokens do.
    """

    name = "sinusoidal"

    def __init__(self, geometry: Geometry, *, base: float) -> None:
        super().__init__(geometry, base=base)
        self.scale = nn.Parameter(torch.tensor(self.token_std(geometry.d_model) / RMS_OF_TABLE))

    def table(self, positions: Tensor) -> Tensor:
        k = torch.arange(0, self.d_model, 2, dtype=torch.float64)
        angles = positions.cpu().double()[:, None] * self.base ** (-k / self.d_model)  # (T, C/2)
        # (T, C/2, 2) -> (T, C): sine and cosine of a frequency side by side
        return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(len(positions), self.d_model).float()

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(embedding=self.table(positions).to(self.scale.device) * self.scale)


class SinusoidalScaled(Sinusoidal):
    """As x-transformers has it (ScaledSinusoidalEmbedding): sines, then cosines, times a scalar that starts at C^-0.5.

    The frequencies are those of Vaswani et al.; only the order of the columns and the start of the scalar differ.
    """

    name = "sinusoidal_scaled"

    def __init__(self, geometry: Geometry, *, base: float) -> None:
        super().__init__(geometry, base=base)
        self.scale = nn.Parameter(torch.tensor(geometry.d_model**-0.5))

    def table(self, positions: Tensor) -> Tensor:
        paired = super().table(positions)
        return torch.cat((paired[:, 0::2], paired[:, 1::2]), dim=-1)


FAIRSEQ_FIRST = 2  # fairseq's first position: the padding index, 1, comes before it


class _FairseqTable(FixedTable):
    """Sines, then cosines, exponents k / (C/2 - 1), positions from 2."""

    def __init__(self, geometry: Geometry, *, base: float) -> None:
        super().__init__(geometry, base=base)
        if geometry.d_model < 4:
            raise ValueError(f"{self.name} needs model.d_model >= 4, not {geometry.d_model}")

    def table(self, positions: Tensor) -> Tensor:
        half = self.d_model // 2
        k = torch.arange(half, dtype=torch.float64)
        angles = (positions.cpu().double() + FAIRSEQ_FIRST)[:, None] * self.base ** (-k / (half - 1))  # (T, C/2)
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


class SinusoidalFairseq(_FairseqTable):
    """Sinusoidal as fairseq builds it and the ALiBi paper ran it (Press et al. 2022, 2108.12409, section 2.2).

    Sines then cosines, exponents k / (C/2 - 1), positions from 2 (padding index 1 comes before them), the tokens
    multiplied by sqrt(C) on an N(0, 1/C) table so that they have root mean square 1; the table is not scaled.
    """

    name = "sinusoidal_fairseq"

    def token_scale(self) -> float:
        return math.sqrt(self.d_model)

    def token_std(self, d_model: int) -> float:
        return float(d_model**-0.5)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(embedding=self.table(positions).to(positions.device))


class SinusoidalQK(_FairseqTable):
    """Position-infused attention: fairseq's table added in every layer to what queries and keys are projected from.

    Press et al. 2021 (Shortformer, 2012.15832): q = W_q (x + p), k = W_k (x + p), v = W_v x, and nothing is added to
    the tokens. As in their code (fairseq/modules/transformer_layer.py of ofirpress/shortformer) x is the layer's input
    after its norm, the table is not scaled and the first position is 2. Tokens start as in every GPT here: the norm
    takes out their size before p is added.
    """

    name = "sinusoidal_qk"

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(qk_embedding=self.table(positions).to(positions.device))
