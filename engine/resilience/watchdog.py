"""The watchdog: a dead rank, a dead launcher or a hang ends the job within seconds, with the rank named and stacks saved.

A thread of every rank looks on. It says that it is alive in a store that rank 0 serves, and reads what the others say only
when something is wrong: its cost is a few small messages a second and rank. Torch itself counts the collectives.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from iomm.config import InputError

# Exit codes: a mistake in words; a rank or the launcher died; no progress for guard.hang_s.
REFUSED, DEAD, HUNG = 2, 70, 71
POLL_S = 0.25
# Between a rank's death and ours: ranks that end by the same error say it themselves.
GRACE_S = 1.5
# How long a rank must be silent to be called so, once something is wrong.
LISTEN_S = 0.75
# What a woken rank gets to write its stacks.
STACKS_S = 0.2


class Watchdog:
    """Use as a context on all ranks together; call beat(step) once a step from the training thread, rest() after the last. An
    InputError that leaves it has been said.

    hang_s counts from the second beat on: the first step may compile, and is left to the time-out of collectives.
    0 turns the search for hangs off; deaths are seen all the same. `parent` is the launcher, or the rank, whose child this was
    when it started: ranks without it would go on, and meet those of the next start. 0: nothing launched this rank.
    """

    def __init__(self, ranks, run_dir, hang_s, parent=0):
        self.ranks, self.run_dir, self.hang_s = ranks, Path(run_dir), hang_s
        self.step, self.beats, self.last, self.pulse = 0, 0, time.monotonic(), 0
        self.parent, self.over, self.stacks = parent, threading.Event(), None
        self.server = (
            dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            if ranks.first
            else None
        )
        everyone = ranks.all(
            (
                place(),
                os.getpid(),
                self.server.port if self.server else 0,
                os.environ.get("MASTER_ADDR"),
            )
        )
        places = [where for where, _, _, _ in everyone]
        self.hosts = [where[0] for where in places]
        here = places[ranks.rank]
        self.pids = {
            r: pid
            for r, (where, pid, _, _) in enumerate(everyone)
            if where == here and r != ranks.rank
        }
        address = "127.0.0.1" if places[0] == here else everyone[0][3]
        self.store = dist.TCPStore(address, everyone[0][2], is_master=False, wait_for_workers=False)
        self.store.set_timeout(timedelta(seconds=0.5))
        self.publish()
        self.alarm = None
        self.thread = threading.Thread(target=self.look, name="watch", daemon=True)
        self.talker = threading.Thread(target=self.talk, name="watch store", daemon=True)

    def __enter__(self):
        self.thread.start()
        self.talker.start()
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, InputError):
            self.refuse(error)
        # A collective failed: somebody has died, it seems.
        if isinstance(error, RuntimeError):
            self.beats = 0
            # Then the thread names the rank and ends this process.
            self.thread.join(GRACE_S + 1.5)
        self.over.set()
        self.thread.join()
        # Ended inside a call of the store, it would abort the process.
        self.talker.join(timeout=2)
        self.rest()

    def beat(self, step):
        """The training thread is alive and begins this step."""
        self.step, self.beats, self.last = step, self.beats + 1, time.monotonic()
        if self.hang_s and self.beats > 1:
            if self.stacks is None:
                self.stacks = open(self.run_dir / f"stacks-rank{self.ranks.rank}.txt", "ab")
            # A native thread of Python's: it writes even when another one never lets go of the interpreter lock.
            faulthandler.dump_traceback_later(self.hang_s, file=self.stacks)

    def rest(self):
        """Nothing is expected from now on; the next beat counts as the first."""
        self.beats = 0
        faulthandler.cancel_dump_traceback_later()
        if self.stacks is not None:
            self.stacks.close()
            with contextlib.suppress(OSError):
                if not os.path.getsize(self.stacks.name):
                    os.unlink(self.stacks.name)
            self.stacks = None

    def talk(self):
        """A thread that does nothing else: not every call of a store comes back when rank 0, its server, is stopped."""
        while not self.over.wait(POLL_S):
            self.publish()
            self.alarm = self.told() or self.alarm

    def ask(self, work, limit_s=1.0):
        """What work() returns within limit_s, or {}."""
        answer = []
        thread = threading.Thread(target=lambda: answer.append(work()), daemon=True)
        thread.start()
        thread.join(limit_s)
        return answer[0] if answer else {}

    def look(self):
        """The thread that decides; it waits for nobody."""
        dead_since = None
        while not self.over.wait(POLL_S):
            if self.ranks.size > 1 and self.parent and os.getppid() != self.parent:
                self.end(DEAD, "the launcher is gone", self.ranks.first)
            dead = [rank for rank, pid in self.pids.items() if not alive(pid)]
            if dead:
                dead_since = dead_since or time.monotonic()
                if time.monotonic() - dead_since > GRACE_S:
                    self.ask(lambda: self.tell(f"{self.name(dead)} died"))
                    self.end(DEAD, f"{self.name(dead)} died", self.ranks.rank == self.lowest(dead))
            told = self.alarm
            if told == "refused":
                self.end(REFUSED, "", False)
            if told and told != "hang":
                self.end(DEAD, told, False)
            idle = time.monotonic() - self.last
            if self.hang_s and self.beats > 1 and (idle > self.hang_s or told):
                self.hung(idle)

    def hung(self, idle):
        """Something stands still: save stacks, listen who answers, name the rank, end all."""
        self.ask(lambda: self.tell("hang"), limit_s=0.1)
        size = os.path.getsize(self.stacks.name)
        faulthandler.cancel_dump_traceback_later()
        if not size:
            faulthandler.dump_traceback(file=self.stacks)
        before = self.ask(self.states)
        if before:
            time.sleep(LISTEN_S)
        after = self.ask(self.states) if before else {}
        others = set(range(self.ranks.size)) - {self.ranks.rank}
        silent = (
            sorted(r for r in others if before[r]["pulse"] == after[r]["pulse"])
            if before and after
            else [0]
        )
        blame = self.blame(after, silent)
        for rank in set(silent) & set(self.pids):
            # A stopped process writes its stacks once it is woken; then it must not go on.
            with contextlib.suppress(OSError):
                os.kill(self.pids[rank], signal.SIGCONT)
                time.sleep(STACKS_S)
                os.kill(self.pids[rank], signal.SIGKILL)
        self.end(
            HUNG,
            f"no progress for {idle:.1f} s in step {self.step}: {blame}; stacks of all ranks in {self.run_dir}",
            self.ranks.rank == self.lowest(silent),
        )

    def blame(self, states, silent):
        """In words, who holds up the others."""
        if silent:
            return f"{self.name(silent)} does not answer (stopped, or in code that keeps the interpreter lock)"
        if self.ranks.size == 1:
            return self.name([0])
        counts = {rank: state["collectives"] for rank, state in states.items()}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        if len(behind) == len(counts):
            return f"{self.name(behind)} all wait in collective {counts[0]}: for different ones, or for the network"
        return f"{self.name(behind)} did not come to collective {min(counts.values()) + 1}, where the others wait"

    def name(self, ranks):
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(
            f"{rank} ({self.hosts[rank]})" for rank in ranks
        )

    def lowest(self, without):
        return min(set(range(self.ranks.size)) - set(without))

    def publish(self):
        self.pulse += 1
        with contextlib.suppress(RuntimeError):
            self.store.set(
                f"rank{self.ranks.rank}",
                json.dumps({"pulse": self.pulse, "collectives": collectives()}),
            )

    def states(self):
        """{rank: what it said last}; empty when the store, and so rank 0, does not answer."""
        with contextlib.suppress(RuntimeError):
            return {r: json.loads(self.store.get(f"rank{r}")) for r in range(self.ranks.size)}
        return {}

    def refuse(self, error):
        """Says the InputError that ends this rank, unless another has said one: rank 0 without delay, the others when it has not
        come to one too, each with its name. Those that came to none end with the same exit code.
        """
        # This rank leaves by itself.
        self.over.set()
        until = time.monotonic() + GRACE_S
        while not self.ranks.first and time.monotonic() < until and not self.ask(self.spoken):
            time.sleep(POLL_S)
        # No answer at all: better twice than never.
        if self.ask(self.speaks) is not False:
            who = "" if self.ranks.first else f"{self.name([self.ranks.rank])}: "
            print(f"iomm: {who}{error}", file=sys.stderr, flush=True)
            self.ask(lambda: self.tell("refused"))
        if self.ranks.first and self.ranks.size > 1:
            # Its store goes with it, and others may not have listened yet.
            time.sleep(4 * POLL_S)

    def spoken(self):
        """Whether a rank has said why the run ends; without rank 0's store, rank 0 has."""
        with contextlib.suppress(RuntimeError):
            return self.store.check(["speaker"])
        return True

    def speaks(self):
        """Whether this rank is the first to ask."""
        with contextlib.suppress(RuntimeError):
            return self.store.add("speaker", 1) == 1
        return False

    def tell(self, what):
        with contextlib.suppress(RuntimeError):
            self.store.set("alarm", what)

    def told(self):
        with contextlib.suppress(RuntimeError):
            return self.store.get("alarm").decode() if self.store.check(["alarm"]) else None
        return None

    def end(self, code, reason, say):
        # The training thread is leaving by itself.
        if not self.over.is_set():
            if say:
                print(
                    f"iomm: {reason}; start again with --resume auto", file=sys.stderr, flush=True
                )
            # The training thread may wait in a collective that never returns.
            os._exit(code)


def place():
    """(name of this host, what else tells where a process id means the same): containers may bear one name, and so may hosts."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return (
        socket.gethostname(),
        boot.read_text().strip() if boot.is_file() else "",
        os.readlink("/proc/self/ns/pid"),
    )


def collectives():
    """How many collectives this process has begun, over all groups."""
    return sum(
        group._get_sequence_number_for_group()
        for group in list(dist.distributed_c10d._world.pg_map)
    )


def alive(pid):
    """Whether a process of this machine runs; one that has ended but was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
