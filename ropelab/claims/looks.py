"""Looks: what is known of earlier verdicts on growing data, so that judging until it passes errs no more often.

Whoever judges a claim after 1, 3 and 6 seeds and stops at the first PASS has three chances of a false one. So every
look is kept beside the runs, and the k-th may spend alpha / (k (k + 1)) of the error rate, which sums to alpha over any
number of them. A verdict on data that was judged before is the same look again.

Claims that were judged together stay a family: whoever judges one of them alone afterwards still chose it among all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropelab import files
from ropelab.claims.files import Claim, ContrastCheck
from ropelab.claims.statistics import look_share

FOLDER = "looks"  # among the runs


@dataclass(frozen=True)
class Look:
    """One verdict on a claim: what was judged, the share of the error rate that it may spend, and what came out.

    `p_pass` and `p_fail` are the claim's one-sided p of "does not pass" and "does not fail", before any correction.
    """

    seeds: int
    data: str  # digest of the runs that were judged, their text, and the thresholds
    share: float
    p_pass: float
    p_fail: float


@dataclass(frozen=True)
class History:
    """The looks at one claim, in their order, and the claims (keys) that it was ever judged with."""

    looks: tuple[Look, ...] = ()
    family: frozenset[str] = field(default_factory=frozenset)

    def find(self, seeds: int, data: str) -> int | None:
        """The place of the look at these data, None where there was none."""
        return next((i for i, look in enumerate(self.looks) if (look.seeds, look.data) == (seeds, data)), None)

    def share(self, seeds: int, data: str, *, last: bool = False) -> float:
        """What a look at these data may spend: as before where there was one. `last`: all that is left."""
        known = self.find(seeds, data)
        if known is not None:
            return self.looks[known].share
        return look_share([look.share for look in self.looks], last=last)

    def after(self, look: Look, family: Sequence[str]) -> History:
        """With one more look, at claims that were judged together."""
        looks = self.looks if self.find(look.seeds, look.data) is not None else (*self.looks, look)
        return History(looks, self.family | set(family))

    def best(self) -> tuple[float, float]:
        """The smallest p of PASS and of FAIL over all looks, each corrected for its share."""
        passing = [min(1.0, look.p_pass / look.share) for look in self.looks if look.share]
        failing = [min(1.0, look.p_fail / look.share) for look in self.looks if look.share]
        return min(passing, default=1.0), min(failing, default=1.0)


def claim_key(claim: Claim) -> str:
    """A claim's name and a digest of what it compares: runs and contrasts, but no threshold, gate or deviation.

    So a threshold that is moved until the claim passes is another look, not another claim.
    """
    checks = [
        sorted((term.run, str(term.scaling), str(term.factor), str(term.control), term.ctx, term.protocol, str(weight))
               for term, weight in check.terms)
        for check in claim.checks if isinstance(check, ContrastCheck)
    ]  # fmt: skip
    asked = json.dumps([sorted(claim.runs.items()), claim.cell.evaluation, checks])
    return f"{claim.id}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


class Looks:
    """The looks at the claims of one runs folder, one file a claim."""

    def __init__(self, runs_dir: Path) -> None:
        self._folder = runs_dir / FOLDER

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No other process looks at the same time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = files.open_lock(self._folder)
        try:
            with contextlib.suppress(OSError):  # some network file systems lock nothing
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def of(self, key: str) -> History:
        """`ValueError` names a file that is damaged: forgetting looks in silence would let errors pass."""
        path = self._folder / f"{key}.json"
        try:
            return _history(files.load_json(path))
        except FileNotFoundError:
            return History()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no record of looks ({error}); remove it, and the looks that it counts are forgotten"
            ) from None

    def of_family(self, keys: Sequence[str]) -> dict[str, History]:
        """The histories of claims and of all that they were judged with."""
        known = {key: self.of(key) for key in keys}
        others = {other for history in known.values() for other in history.family} - set(known)
        return known | {key: self.of(key) for key in sorted(others)}

    def keep(self, key: str, history: History) -> None:
        looks = [vars(look) for look in history.looks]
        files.write_sealed(self._folder / f"{key}.json", {"looks": looks, "family": sorted(history.family)})


def _history(value: Mapping[str, Any]) -> History:
    looks = tuple(
        Look(int(item["seeds"]), str(item["data"]), *(float(item[key]) for key in ("share", "p_pass", "p_fail")))
        for item in value["looks"]
    )
    family = [str(key) for key in value["family"]]
    for look in looks:
        if not (look.seeds > 0 and 0 <= look.share <= 1 and 0 <= look.p_pass <= 1 and 0 <= look.p_fail <= 1):
            raise ValueError(f"a look of {look}")
    if any(key != Path(key).name or len(key) > 200 for key in family) or len(family) > 1000:
        raise ValueError("a claim's name is a path, or there are thousands of them")
    return History(looks, frozenset(family))
