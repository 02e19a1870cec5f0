"""A bias that depends on the query and the distance, as the fused kernel reads it: bands of query rows.

Band n holds query rows n BAND .. (n + 1) BAND - 1 of those requested and the keys up to its last query: of all pairs
of queries and keys little more than the half that is seen is computed and kept. A head's bands stand one after
another in memory, each row by row, so that all of them are one tensor (H, N), which every layer reads and whose
gradient is added up over the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropelab.attention.bias import ByQuery

BAND = 512  # rows: 1/16 more numbers than seen pairs at 8192 tokens, and no band too small to fill a GPU
ALIGNED = 16  # rows begin at multiples of so many numbers, for wide loads


def make(by_query: ByQuery, start: int, stop: int, *, device: torch.device, again: bool) -> Tensor:
    """The bias of queries start .. stop-1 and keys 0 .. stop-1 in bands, (H, N) fp32; N is `numel(start, stop)`.

    `start` is a multiple of ALIGNED. Later keys than a query stand at distance 0 of it and are read by nobody.
    `again`: keep nothing but the result for the backward pass, which makes a band again.
    """
    assert start % ALIGNED == 0

    def band(low: int, high: int, keys: int) -> Tensor:
        index = torch.arange(low, high, device=device, dtype=torch.float32)[:, None]  # (rows, 1)
        distance = index - torch.arange(keys, device=device, dtype=torch.float32)  # (rows, keys)
        return by_query(index, distance.clamp_(min=0)).flatten(1)  # (H, rows, keys) -> (H, rows x keys)

    parts = []
    for low in range(start, stop, BAND):
        of_band = low, min(low + BAND, stop), width(low, stop)
        if again and torch.is_grad_enabled():
            parts.append(checkpoint(band, *of_band, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(band(*of_band))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def width(low: int, stop: int) -> int:
    """Keys in each row of the band whose first query is `low`, of queries up to stop - 1."""
    return min(low + BAND, -(-stop // ALIGNED) * ALIGNED)


def numel(start: int, stop: int) -> int:
    """Numbers of a head in the bands of queries start .. stop-1."""
    return sum((min(low + BAND, stop) - low) * width(low, stop) for low in range(start, stop, BAND))
