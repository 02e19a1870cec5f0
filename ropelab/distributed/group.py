"""Several processes that train or evaluate one run together: who they are, and how they communicate.

A command enters `init_distributed` once and hands the `Ranks` down from there: `SINGLE` where one process was started,
which communicates with nobody and needs no torch. Otherwise the ranks have two channels:

- the store, a table of short texts that the first rank (or torchrun) serves: for decisions before anything is
  computed, and for failures. Nothing but JSON goes through it.
- the process group, for tensors: NCCL between CUDA devices, gloo between CPUs. It begins with `connect`.

Every method that says "on all ranks" is called by all of them, in the same order.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ropelab.errors import RankLostError, RemoteRankError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT = timedelta(minutes=60)  # for a rank that does not come to where the others wait for it
PATIENCE = timedelta(hours=24)  # for the first rank, while it prepares the text
GRACE = 5.0  # seconds in which a rank that failed says so, after its connections broke
PRECEDENCE = 2.0  # seconds in which the first rank may fail by the same cause as another, and is the one to say it
LINGER = 10.0  # seconds that a rank which leaves waits for the others to do so
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # those that stop a training; the first of them counts

T = TypeVar("T")


class Launch(NamedTuple):
    """The place of this process among those that the launcher started."""

    rank: int
    world: int  # processes in all
    local_rank: int  # among those of this machine
    local_world: int
    host: str  # where the ranks meet: a machine of theirs
    port: int
    served: bool  # does the launcher serve the store there? Otherwise rank 0 does


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """How torchrun or Slurm started this process; None where it is the only one.

    Of Slurm only the tasks of a step count: a batch script is one process, however many tasks its job may have.
    MASTER_ADDR and MASTER_PORT hold for both. `ValueError` for an environment that makes no sense.
    """
    try:
        if all(key in environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
            found = Launch(
                int(environ["RANK"]), int(environ["WORLD_SIZE"]),
                int(environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", 0))),
                int(environ.get("LOCAL_WORLD_SIZE", 1)), environ["MASTER_ADDR"], int(environ["MASTER_PORT"]),
                served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            )  # fmt: skip
        elif "SLURM_STEP_NUM_TASKS" in environ:
            found = _slurm_task(environ)
        else:
            return None
    except (LookupError, ValueError) as error:
        raise ValueError(f"the launcher's environment cannot be read ({error}); use torchrun or srun") from None
    if not 0 <= found.rank < found.world:
        raise ValueError(f"rank {found.rank} of {found.world} does not exist; use torchrun or srun")
    return found if found.world > 1 else None


def _slurm_task(environ: Mapping[str, str]) -> Launch:
    world = int(environ["SLURM_STEP_NUM_TASKS"])
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", 0))
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", str(world))  # 2(x3),1: that of each node
    each = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    return Launch(
        int(environ["SLURM_PROCID"]), world, int(environ["SLURM_LOCALID"]), each[int(environ.get("SLURM_NODEID", 0))],
        environ.get("MASTER_ADDR") or ("127.0.0.1" if len(each) == 1 else first_host(nodes)),
        # steps of one job, and jobs one after the other, get other ports, below those that a system gives away itself
        int(environ.get("MASTER_PORT") or 10000 + (31 * job + step) % 20000),
        served=False,
    )  # fmt: skip


def first_host(nodes: str) -> str:
    """The first machine of Slurm's compressed list: `gpu[07-09,12],n1` is gpu07."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if head is None:
        raise ValueError(f"no machine in '{nodes}'")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head.group())


@contextlib.contextmanager
def init_distributed(status_of: Callable[[BaseException], int]) -> Iterator[Ranks]:
    """The ranks of a command, until it ends; `SINGLE` where this process was started alone.

    `status_of` gives the exit status for an exception. The first rank that fails reports it to the others. Only its
    exception is raised; the others raise `RemoteRankError`, or `RankLostError` where no report reached them.
    """
    launch = detect_launch()
    if launch is None:
        yield SINGLE
        return
    # torch's C++ warns of what is meant, as of buckets in a fixed order (see `wrap_ddp`); read when torch is loaded
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ranks = Ranks(launch, status_of)
    try:
        yield ranks
    except BaseException as error:
        cause = ranks.cause(error)
        _release_frames(error)
        ranks.shutdown(failed=True, gone=isinstance(cause, RankLostError))
        if cause is error:
            raise
        raise cause from None
    ranks.shutdown(failed=False)


class Ranks:
    """The ranks of one command, as one of them sees them."""

    def __init__(
        self, launch: Launch | None = None, status_of: Callable[[BaseException], int] = lambda error: 1
    ) -> None:
        self.rank, self.world = (launch.rank, launch.world) if launch else (0, 1)
        self.local_rank, self.local_world = (launch.local_rank, launch.local_world) if launch else (0, 1)
        self._launch, self._status_of = launch, status_of
        self._device: torch.device | None = None
        self._calls = 0
        if launch is not None:
            self._store = _store(launch)

    @property
    def is_first(self) -> bool:
        """Is this the rank that writes files and messages?"""
        return self.rank == 0

    # the store

    def broadcast_object(self, compute: Callable[[], T], patience: timedelta = TIMEOUT) -> T:
        """On all ranks: a JSON value that only the first rank computes."""
        if self.world == 1:
            return compute()
        key = self._key("broadcast")
        if self.is_first:
            value = compute()
            self._store.set(key, json.dumps(value))
            return value
        self._wait(key, patience)
        value_of_first: T = json.loads(self._store.get(key))
        return value_of_first

    @contextlib.contextmanager
    def first_then_others(self) -> Iterator[None]:
        """On all ranks: the first one finishes the block before the others begin it."""
        if self.is_first:
            yield
            self.broadcast_object(lambda: None)
        else:
            self.broadcast_object(lambda: None, PATIENCE)
            yield

    @contextlib.contextmanager
    def barrier_after(self) -> Iterator[None]:
        """On all ranks: each runs the block by itself; no rank continues before all have finished it."""
        yield
        self.barrier()

    def barrier(self) -> None:
        """On all ranks: wait until every rank is here. `RemoteRankError` if one failed instead."""
        if self.world > 1:
            key = self._key("barrier")
            if self._store.add(f"{key}/count", 1) == self.world:
                self._store.set(key, "")
            self._wait(key, TIMEOUT)

    def check_alike(self, what: str, value: str) -> None:
        """On all ranks: `ValueError` on those whose value is not the first one's."""
        if value != self.broadcast_object(lambda: value):
            raise ValueError(
                f"rank {self.rank} has another {what} than rank 0: all need the same command, code and text"
            )

    def _key(self, what: str) -> str:
        self._calls += 1
        return f"{what}/{self._calls}"

    def _wait(self, key: str, patience: timedelta) -> None:
        """Wait until the store has a key. `RemoteRankError` when a rank failed meanwhile."""
        began = time.monotonic()
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise self._remote_error()
            waited = time.monotonic() - began
            if waited > patience.total_seconds():
                raise RankLostError(f"a rank did not come within {patience}: see its own output")
            time.sleep(min(max(waited / 20, 0.001), 0.25))

    def _remote_error(self) -> RemoteRankError:
        return RemoteRankError(**json.loads(self._store.get("failed")))

    # failing and leaving

    def cause(self, error: BaseException) -> BaseException:
        """The exception to raise: this one, or `RemoteRankError` if another rank failed first, `RankLostError` if gone.

        The failure is reported to the other ranks. Where one cause stops all at once, the exception of the first rank
        is raised. A second call for the same failure returns the same.
        """
        if self.world == 1 or isinstance(error, RemoteRankError):
            return error
        broken = _is_broken_connection(error)
        signum = getattr(error, "signum", None)
        report = json.dumps(
            {"rank": self.rank, "status": self._status_of(error), "message": _first_line(error), "signum": signum}
        )
        try:
            deadline = time.monotonic() + (GRACE if broken else 0 if self.is_first else PRECEDENCE)
            while not self._store.check(["failed"]) and time.monotonic() < deadline:
                time.sleep(0.05)
            first = self._store.compare_set("failed", "", report)
        except RuntimeError:
            return RankLostError("the first rank is gone: see its own output; the same command goes on")
        if json.loads(first)["rank"] != self.rank:
            return self._remote_error()
        return (
            RankLostError(f"another rank is gone: {_first_line(error)}; the same command goes on") if broken else error
        )

    def shutdown(self, *, failed: bool, gone: bool = False) -> None:
        """End the group, even while other ranks are still in it.

        After a failure all wait for each other for a while, so that a launcher which ends the rest when one process
        ends finds all of them ended by themselves; else only the rank that serves the store waits.
        """
        import torch.distributed as dist

        assert self._launch is not None
        # NCCL could wait in here for a rank that is gone: there the end of the process is the end of the group
        if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
            dist.destroy_process_group()
        self._device = None
        with contextlib.suppress(RuntimeError):  # the store is gone already
            left = self._store.add("left", 1)
            deadline = time.monotonic() + LINGER
            stays = failed or (self.is_first and not self._launch.served)
            while stays and left < self.world - gone and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._store.add("left", 0)

    # the group

    def connect(self, device: torch.device) -> None:
        """On all ranks: begin the process group of a kind of device; once it has begun there is nothing to do."""
        if self.world == 1 or self._device is not None:
            return
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.check_alike("kind of device", device.type)
        self.barrier()  # the group would wait long for a rank that failed before
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=PrefixStore("group", self._store),
            rank=self.rank, world_size=self.world, timeout=TIMEOUT,
        )  # fmt: skip
        self._device = device

    def shard(self, n: int) -> slice:
        """This rank's part of n items in a row; the number of ranks divides n."""
        assert n % self.world == 0
        each = n // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """On all ranks: the sum of their tensors, in place, on the device of the group."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> None:
        """On all ranks: the tensor of rank `source`, in place; on any device."""
        if self.world > 1:
            import torch.distributed as dist

            assert self._device is not None
            with_device = tensor.detach().to(self._device).contiguous()
            dist.broadcast(with_device, source)
            if with_device.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(with_device)

    def signals(self, caught: Sequence[int]) -> Sequence[int]:
        """On all ranks: the signals that any of them caught; the same on all of them, which waits for the device."""
        if self.world == 1:
            return caught
        import torch

        count = torch.tensor([int(signum in caught) for signum in SIGNALS], device=self._device)
        return [signum for signum, n in zip(SIGNALS, self.all_reduce(count).tolist(), strict=True) if n]


SINGLE = Ranks()


def _release_frames(error: BaseException) -> None:
    """Free what the frames of an exception hold: gloo closes its connections with the last of its users.

    Until then a rank that waits in a collective operation would not learn that this one does not come.
    """
    import gc
    import traceback

    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()


def _store(launch: Launch) -> Any:
    """The store of a launch. `ConnectionError` where the ranks cannot meet."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(
            launch.host, launch.port, launch.world, is_master=launch.rank == 0 and not launch.served,
            timeout=timedelta(minutes=5), wait_for_workers=False,
        )  # fmt: skip
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {launch.rank} of {launch.world} cannot meet the others at {launch.host}, port {launch.port} "
            f"({_first_line(error)}); set MASTER_ADDR to a machine that all of them reach, MASTER_PORT to a free port"
        ) from None
    # torchrun keeps its table when it starts the ranks again
    return PrefixStore(f"ropelab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _is_broken_connection(error: BaseException) -> bool:
    """Does an exception say that another rank cannot be reached any more?"""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    """The first line of what an exception says; of gloo's without the place in its source and its guesses."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"^\[\S*\.cc:\d+\] ", "", line).partition(". This is typically")[0]
