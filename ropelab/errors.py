"""The exceptions that ropelab raises, in one tree under `RopelabError`.

RopelabError
├── UserError              a mistake in what was asked; the message names the fix (also a ValueError)
│   ├── ContextLengthError     an encoding is undefined at the requested length
│   ├── RunError               a run that cannot be used
│   │   └── RunBusyError           another process writes it
│   ├── CacheError             the cache cannot be written
│   ├── DamagedFileError       a file that is not what was written
│   └── OutsideError           a path that does not lie where it must
├── NonFiniteLossError     a training diverged
├── Interrupted            a signal came, and the run was saved
├── SchedulerError         Slurm did not do what it was asked
├── RemoteRankError        another rank failed and has said why
└── RankLostError          another rank ended without a word
"""

from __future__ import annotations


class RopelabError(Exception):
    """The base of all of them."""


class UserError(RopelabError, ValueError):
    """A mistake in what was asked, or in a file that was given: one line, which names the fix, and exit status 2."""


class ContextLengthError(UserError):
    """An encoding is undefined at the requested context length (a learned table past its end)."""


class RunError(UserError):
    """A run that cannot be used: missing, unfinished, locked, or altered."""


class RunBusyError(RunError):
    """Another process writes the run."""


class CacheError(UserError):
    """The cache cannot be written: a fault of the place, and of no configuration."""


class DamagedFileError(UserError):
    """A file that is not what was written; the message says how, without the file's name."""


class OutsideError(UserError):
    """A path that does not lie in the folder that it was given for, is reached through a link, or is no file."""


class NonFiniteLossError(RopelabError, RuntimeError):
    """The loss or its gradient became NaN or infinite; `step` is the step whose batch did it."""

    def __init__(self, step: int, what: str, value: float) -> None:
        super().__init__(f"the {what} became {value} at step {step}; lower train.lr or use train.dtype=fp32")
        self.step = step


class Interrupted(RopelabError):
    """SIGINT, SIGTERM or SIGUSR2 came, and the run was saved; `signum` says which."""

    def __init__(self, signum: int, run: str, step: int) -> None:
        super().__init__(f"{run} saved at step {step}; the same command goes on from there")
        self.signum = signum


class SchedulerError(RopelabError, RuntimeError):
    """Slurm did not do what it was asked."""


class RemoteRankError(RopelabError):
    """Another rank failed and has said why; this one ends with the same exit status, and says nothing.

    signum: the signal that stopped them all, where that was why.
    """

    def __init__(self, rank: int, status: int, message: str, signum: int | None) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.status, self.signum = status, signum


class RankLostError(RopelabError, ConnectionError):
    """Another rank ended without a word, as by SIGKILL or with its machine."""
