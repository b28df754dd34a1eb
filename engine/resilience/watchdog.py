"""End the job within seconds of a dead rank, a dead launcher, a lost host or a hang.

The watchdog names the rank at fault and saves the stacks of all ranks. A thread of every rank
publishes a heartbeat to a store that rank 0 serves. Rank 0 reads the heartbeats of ranks on other
hosts, and every other rank the store's answers; the rest is read only when something is wrong. This
costs a few small messages per second and rank. torch itself counts the collectives.

What ends a run is printed to sys.stderr and not logged: another thread may be blocked in a write to
the log (on a disk that hangs) while it holds a lock of a log handler.
"""

import contextlib
import faulthandler
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import torch.distributed as dist

from iomm.config import InputError
from iomm.engine.resilience.rank_group import RankGroup

# Exit codes: an error in what the user gave; a rank or the launcher died; no progress for
# guard.hang_s.
REFUSED, DEAD, HUNG = 2, 70, 71
POLL_S = 0.25
# Time between another rank's death and this rank's exit. Ranks that end by the same error report it
# themselves.
GRACE_S = 1.5
# Time without a heartbeat after which a rank counts as not responding, once something is wrong.
LISTEN_S = 0.75
# Time for a resumed rank to write its stacks.
STACKS_S = 0.2
# Time after which a call of the store counts as unanswered, and a new connection is made: after an
# outage TCP's next attempt on the old one may be as far away as the outage was long.
ANSWER_S = 2.0
# Time without a heartbeat from another host after which a failed collective is put down to its
# death.
DEAD_S = 2.5
# Time for which rank 0 keeps serving an alarm before it exits.
LINGER_S = 4 * POLL_S
# Time after which a wait for other ranks is reported.
REPORT_S = 10.0


class Host(NamedTuple):
    """What identifies the host of a process.

    Several containers can have the same name, and so can several hosts. Ranks on the same host
    reach each other at 127.0.0.1.
    """

    name: str
    boot: str
    pid_namespace: str
    net_namespace: str

    def shares_pids(self, other: Self) -> bool:
        """Return whether process ids mean the same on both, as in containers of one pod."""
        return self[:3] == other[:3]


class Alarm(NamedTuple):
    """Why the run ends: "dead", "lost", "hang" or "refused", and the ranks at fault."""

    kind: str
    reason: str = ""
    ranks: Collection[int] = ()


class Watchdog:
    """Watch over all ranks while training runs. Use it as a context on all ranks together.

    Call heartbeat(step) once per step from the training thread, and pause() after the last. The
    watchdog itself reports an InputError that leaves the context.
    """

    def __init__(
        self,
        ranks: RankGroup,
        run_dir: Path | str,
        hang_s: float,
        lost_s: float = 0.0,
        parent: int = 0,
    ) -> None:
        """Create the store and connect to it, on all ranks together.

        Args:
            ranks: All ranks.
            run_dir: The folder for stacks.
            hang_s: Longest time between heartbeats, counted from the second one on. The first step
                may compile, and is covered by the timeout of collectives. 0 does not detect hangs;
                deaths are detected in any case.
            lost_s: Longest time without a heartbeat from another host while no collective starts
                here. 0 waits for it until a collective fails.
            parent: Process id of the parent (the launcher or rank 0) when this rank started.
                Without their parent, ranks would continue and collide with those of the next start.
                0: nothing launched this rank.
        """
        self.ranks = ranks
        self.run_dir = Path(run_dir)
        self.hang_s = hang_s
        self.lost_s = lost_s
        self.parent = parent
        self.step = 0
        # Heartbeats since the last pause.
        self.beats = 0
        self.last_beat = time.monotonic()
        # A collective has failed, therefore this rank is about to leave.
        self.failed = False
        # Number of messages published to the store, and of answers from it.
        self.pulse = self.answers = 0
        self.over = threading.Event()
        self.stacks: BinaryIO | None = None
        self.server = (
            dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            if ranks.first
            else None
        )
        everyone = ranks.all(
            (
                host_identity(),
                os.getpid(),
                self.server.port if self.server else 0,
                os.environ.get("MASTER_ADDR"),
            )
        )
        self.hosts: list[Host] = [Host(*host) for host, _, _, _ in everyone]
        self.host = self.hosts[ranks.rank]
        # Process ids of the other ranks that can be observed from here.
        self.pids: dict[int, int] = {
            r: pid
            for r, (_, pid, _, _) in enumerate(everyone)
            if self.hosts[r].shares_pids(self.host) and r != ranks.rank
        }
        # Ranks that only the network connects with this one.
        self.remote = [r for r, host in enumerate(self.hosts) if host != self.host]
        # This rank has reached rank 0 at its own MASTER_ADDR, in whatever way rank 0 names itself.
        own_address = os.environ.get("MASTER_ADDR") or everyone[0][3]
        self.address = own_address if 0 in self.remote else "127.0.0.1"
        self.port = everyone[0][2]
        with reported_wait(f"the heartbeat store of rank 0 at {self.address}:{self.port}"):
            self.store = self.connect()
        # What was last published by the remote ranks.
        self.published: dict[int, bytes] = {}
        # The same at the last poll, and the answers of a remote store under 0; for how long it has
        # not changed.
        self.marks: dict[int, Any] = {}
        self.silent_s: dict[int, float] = {}
        self.collectives = 0
        self.publish(self.store)
        self.alarm: Alarm | None = None
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.store_thread = threading.Thread(
            target=self.exchange, name="watchdog store", daemon=True
        )

    def __enter__(self) -> Self:
        self.thread.start()
        self.store_thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if isinstance(error, InputError):
            self.report(error)
        # A collective failed: a peer rank probably died.
        if isinstance(error, RuntimeError):
            self.beats = 0
            self.failed = True
            if self.remote and threading.current_thread() is threading.main_thread():
                # A launcher that lost the same host must not end this rank before it is named.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            # If so, the thread names the rank and ends this process.
            self.thread.join((2 * DEAD_S if self.remote else GRACE_S) + 1.5)
        self.over.set()
        self.thread.join()
        # The process would abort if it ended during a call of the store.
        self.store_thread.join(timeout=2)
        self.pause()

    def heartbeat(self, step: int) -> None:
        """Record that the training thread starts a step."""
        self.step = step
        self.beats += 1
        self.last_beat = time.monotonic()
        if self.hang_s and self.beats > 1:
            self.open_stacks()
            # This is a native thread of Python, which writes even if another thread never releases
            # the GIL.
            faulthandler.dump_traceback_later(self.hang_s, file=self.stacks)

    def pause(self) -> None:
        """Expect no heartbeats until the next one, which counts as the first again."""
        self.beats = 0
        faulthandler.cancel_dump_traceback_later()
        if self.stacks is not None:
            self.stacks.close()
            with contextlib.suppress(OSError):
                if not os.path.getsize(self.stacks.name):
                    os.unlink(self.stacks.name)
            self.stacks = None

    def open_stacks(self) -> None:
        """Open the file for the stacks of this rank."""
        if self.stacks is None:
            self.stacks = open(  # noqa: SIM115 (faulthandler writes to it when the rank hangs)
                self.run_dir / f"stacks-rank{self.ranks.rank}.txt", "ab"
            )

    def exchange(self) -> None:
        """Publish heartbeats and read alarms, in a thread.

        The thread does nothing else, because calls of a store may block forever when rank 0, its
        server, is stopped or cannot be reached.
        """
        while not self.over.wait(POLL_S):
            if self.call(self.ask_store, ANSWER_S):
                self.answers += 1
            elif 0 in self.remote:
                # The call that is still blocked ends with its connection.
                while not self.over.is_set() and not self.call(self.reconnect, 2 * ANSWER_S):
                    self.over.wait(POLL_S)

    def ask_store(self) -> bool:
        """Publish a heartbeat, and read the alarm and the heartbeats of remote ranks.

        Only rank 0 reads heartbeats as long as no collective has failed.

        Returns:
            Whether the store has answered.
        """
        store = self.store
        self.publish(store)
        try:
            if store.check(["alarm"]):
                self.alarm = Alarm(**json.loads(store.get("alarm")))
            if self.remote and (self.ranks.first or self.failed):
                values = store.multi_get([f"rank{r}" for r in self.remote])
                self.published = dict(zip(self.remote, values, strict=True))
        except RuntimeError:
            return False
        return True

    def connect(self, timeout_s: float = 300.0) -> dist.TCPStore:
        """Return a new connection to the store."""
        store = dist.TCPStore(
            self.address,
            self.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
        store.set_timeout(timedelta(seconds=0.5))
        return store

    def reconnect(self) -> bool:
        """Exchange the connection to the store for a new one, if rank 0's host can be reached.

        torch prints a warning for every attempt that fails, therefore a plain socket goes first.
        """
        with contextlib.suppress(OSError, RuntimeError):
            socket.create_connection((self.address, self.port), timeout=ANSWER_S / 2).close()
            self.store = self.connect(ANSWER_S)
            return True
        return False

    def call(self, work: Callable[[], Any], limit_s: float = 1.0) -> Any:
        """Return the result of work(), or {} if it takes longer than limit_s."""
        answer = []
        thread = threading.Thread(target=lambda: answer.append(work()), daemon=True)
        thread.start()
        thread.join(limit_s)
        return answer[0] if answer else {}

    def watch(self) -> None:
        """End the process when a rank, the launcher or this rank has failed, in a thread.

        This thread never blocks on another one.
        """
        dead_since = None
        polled = time.monotonic()
        while not self.over.wait(POLL_S):
            if self.ranks.size > 1 and self.parent and os.getppid() != self.parent:
                self.exit(DEAD, "the launcher died", self.ranks.first)
            dead = [rank for rank, pid in self.pids.items() if not alive(pid)]
            if dead:
                dead_since = dead_since or time.monotonic()
                if time.monotonic() - dead_since > GRACE_S:
                    self.end_dead(Alarm("dead", f"{self.describe(dead)} died", dead))
            now = time.monotonic()
            # A process that was stopped, or whose machine was, has not waited for the others.
            self.listen(min(now - polled, 4 * POLL_S))
            polled = now
            if self.remote:
                self.end_lost()
            alarm = self.alarm
            if alarm is not None and alarm.kind == "refused":
                self.exit(REFUSED, "", False)
            if alarm is not None and alarm.kind != "hang":
                self.end_dead(alarm, publish=False)
            idle_s = now - self.last_beat
            if self.hang_s and self.beats > 1 and (idle_s > self.hang_s or alarm):
                self.end_hang(idle_s)

    def listen(self, elapsed_s: float) -> None:
        """Add the time since the last poll to the silence of the remote ranks.

        A rank is silent while its heartbeats stop and this rank starts no collective. A rank that
        takes part in collectives is alive.
        """
        marks: dict[int, Any] = dict(self.published)
        if 0 in self.remote:
            marks[0] = self.answers
        collectives = num_collectives()
        for rank, mark in marks.items():
            if mark == self.marks.get(rank) and collectives == self.collectives:
                self.silent_s[rank] += elapsed_s
            else:
                self.silent_s[rank] = 0.0
        self.marks, self.collectives = marks, collectives

    def end_lost(self) -> None:
        """Exit if a host was silent for too long; after a failed collective, a moment is enough."""
        limit_s = DEAD_S if self.failed else self.lost_s
        if not limit_s or max(self.silent_s.values(), default=0.0) <= limit_s:
            return
        # Other ranks of the same host may have been heard a moment later.
        lost = [rank for rank, silent_s in self.silent_s.items() if silent_s > 0.8 * limit_s]
        if 0 in lost:
            # What is known of the others has come from rank 0.
            lost = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[0]]
        if self.failed:
            self.end_dead(Alarm("dead", f"{self.describe(lost)} died", lost))
        reason = (
            f"no heartbeat from {self.describe(lost)} for {limit_s:g} s: the host or its network "
            f"failed; stacks of the other ranks are in {self.run_dir}"
        )
        self.end_dead(Alarm("lost", reason, lost))

    def end_dead(self, alarm: Alarm, publish: bool = True) -> None:
        """Publish why the run ends and exit. The lowest rank left on each host prints it."""
        if publish:
            self.call(functools.partial(self.raise_alarm, alarm))
        if alarm.kind == "lost":
            self.call(self.write_stacks, ANSWER_S + 2 * STACKS_S)
        if self.ranks.first and self.remote:
            time.sleep(LINGER_S)
        own = [rank for rank, host in enumerate(self.hosts) if host == self.host]
        reports = self.ranks.rank == min(set(own) - set(alarm.ranks), default=-1)
        self.exit(DEAD, alarm.reason, reports)

    def write_stacks(self) -> None:
        """Write the stacks of this rank."""
        self.open_stacks()
        size = os.path.getsize(self.stacks.name)
        # From a native thread: a folder that hangs must not hold the GIL.
        faulthandler.dump_traceback_later(0.01, file=self.stacks)
        until = time.monotonic() + ANSWER_S
        # On a busy machine, the thread starts late.
        while os.path.getsize(self.stacks.name) == size and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(STACKS_S)

    def end_hang(self, idle_s: float) -> None:
        """Save the stacks, find the ranks that do not respond, name the rank at fault and exit."""
        self.call(lambda: self.raise_alarm(Alarm("hang")), limit_s=0.1)
        size = os.path.getsize(self.stacks.name)
        faulthandler.cancel_dump_traceback_later()
        if not size:
            faulthandler.dump_traceback(file=self.stacks)
        before = self.call(self.read_states)
        if before:
            time.sleep(LISTEN_S)
        after = self.call(self.read_states) if before else {}
        others = set(range(self.ranks.size)) - {self.ranks.rank}
        silent = (
            sorted(r for r in others if before[r]["pulse"] == after[r]["pulse"])
            if before and after
            else [0]
        )
        cause = self.explain(after, silent)
        for rank in set(silent) & set(self.pids):
            # A stopped process writes its stacks once it is resumed. It must not train afterwards.
            with contextlib.suppress(OSError):
                os.kill(self.pids[rank], signal.SIGCONT)
                time.sleep(STACKS_S)
                os.kill(self.pids[rank], signal.SIGKILL)
        self.exit(
            HUNG,
            f"no progress for {idle_s:.1f} s in step {self.step}: {cause}; stacks of all ranks are "
            f"in {self.run_dir}",
            self.ranks.rank == self.lowest_except(silent),
        )

    def explain(self, states: dict[int, dict[str, int]], silent: list[int]) -> str:
        """Return which ranks block the others, in words."""
        if silent:
            return (
                f"{self.describe(silent)} not responding (stopped, or in code that holds the GIL)"
            )
        if self.ranks.size == 1:
            return self.describe([0])
        counts = {rank: state["collectives"] for rank, state in states.items()}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        if len(behind) == len(counts):
            return (
                f"{self.describe(behind)} all wait in collective {counts[0]}: the collectives do "
                "not match, or the network failed"
            )
        return (
            f"{self.describe(behind)} did not reach collective {min(counts.values()) + 1}, in "
            "which the others wait"
        )

    def describe(self, ranks: Collection[int]) -> str:
        """Return ranks with their hosts, in words."""
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(
            f"{rank} ({self.hosts[rank].name})" for rank in ranks
        )

    def lowest_except(self, ranks: Iterable[int]) -> int:
        """Return the lowest rank that is not one of `ranks`."""
        return min(set(range(self.ranks.size)) - set(ranks))

    def publish(self, store: dist.TCPStore) -> None:
        """Write this rank's heartbeat and number of collectives to the store."""
        self.pulse += 1
        with contextlib.suppress(RuntimeError):
            store.set(
                f"rank{self.ranks.rank}",
                json.dumps({"pulse": self.pulse, "collectives": num_collectives()}),
            )

    def read_states(self) -> dict[int, dict[str, int]]:
        """Return {rank: what it published last}, empty if the store on rank 0 does not respond."""
        with contextlib.suppress(RuntimeError):
            return {r: json.loads(self.store.get(f"rank{r}")) for r in range(self.ranks.size)}
        return {}

    def report(self, error: InputError) -> None:
        """Print the InputError that ends this rank, unless another rank has printed one.

        Rank 0 prints without delay. The others wait for rank 0 to print its own, then print theirs
        with their name. Ranks without an error end with the same exit code.
        """
        # This rank exits by itself.
        self.over.set()
        until = time.monotonic() + GRACE_S
        while not self.ranks.first and time.monotonic() < until and not self.call(self.reported):
            time.sleep(POLL_S)
        # Without any answer from the store, printing twice is better than never.
        if self.call(self.claim_report) is not False:
            who = "" if self.ranks.first else f"{self.describe([self.ranks.rank])}: "
            print(f"iomm: {who}{error}", file=sys.stderr, flush=True)
            self.call(lambda: self.raise_alarm(Alarm("refused")))
        if self.ranks.first and self.ranks.size > 1:
            # The store ends with this rank, and others may not have read the alarm yet.
            time.sleep(LINGER_S)

    def reported(self) -> bool:
        """Return whether a rank has printed why the run ends.

        If rank 0's store does not respond, rank 0 has.
        """
        with contextlib.suppress(RuntimeError):
            return self.store.check(["speaker"])
        return True

    def claim_report(self) -> bool:
        """Return whether this rank is the first to call this, and has to print the error."""
        with contextlib.suppress(RuntimeError):
            return self.store.add("speaker", 1) == 1
        return False

    def raise_alarm(self, alarm: Alarm) -> None:
        """Publish why the run ends to all ranks."""
        with contextlib.suppress(RuntimeError):
            self.store.set("alarm", json.dumps(alarm._asdict()))

    def exit(self, code: int, reason: str, report: bool) -> None:
        """End this process with an exit code, unless its training thread is already leaving."""
        if not self.over.is_set():
            if report:
                print(f"iomm: {reason}; restart with --resume auto", file=sys.stderr, flush=True)
            # Not sys.exit: the training thread may wait in a collective that never returns.
            os._exit(code)


def host_identity() -> Host:
    """Return the identity of this process's host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return Host(
        socket.gethostname(),
        boot.read_text().strip() if boot.is_file() else "",
        *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")),
    )


@contextlib.contextmanager
def reported_wait(what: str, after_s: float = REPORT_S) -> Iterator[None]:
    """Print what this host waits for, if the block takes longer than after_s.

    The first rank of the host prints it, because the terminal shows the log of rank 0 alone.
    """

    def report() -> None:
        name = socket.gethostname()
        print(f"iomm: {name} is waiting for {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(after_s, report)
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def num_collectives() -> int:
    """Return how many collectives this process has started, over all groups."""
    return sum(
        group._get_sequence_number_for_group()
        for group in list(dist.distributed_c10d._world.pg_map)
    )


def alive(pid: int) -> bool:
    """Return whether a process of this machine runs. A zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
