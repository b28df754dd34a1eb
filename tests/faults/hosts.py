"""Fault trials on several hosts (helpers/namespaces.py).

Most run the toy job, one rank on each host. Each function injects a fault n times and returns its
counts, or raises.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.real import entries, small_run
from faults.toy_job import Job
from faults.trials import final_files, log_rows, newest_logged_commit, newest_step, samples_of
from launches import LIMIT_S, ROOT, environment, rows
from namespaces import Hosts

from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import DEAD, alive

# Trials wait most of the time, therefore several run side by side, each with separate hosts.
SIDE_BY_SIDE = 4
# Exit codes and names are due so long after guard.lost_s.
BEYOND_S = 5.0


def in_parallel(trial, arguments):
    """Return [trial(*words) for words in arguments]."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(lambda words: trial(*words), arguments))


def wait_for_steps(job, number):
    """Wait until the job has logged a number of steps."""
    log = job.run_dir / "log.jsonl"
    until = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < number:
        assert time.monotonic() < until and any(map(alive, job.pids)), job.out[-2000:]
        time.sleep(0.01)


def output_of(job, rank):
    """Return the output of one rank."""
    return (job.run_dir / f"out-rank{rank}.txt").read_text()


# What happens to a host, and whether its own ranks live on.
LOSSES = {"kill": False, "cut": True, "unplug": True}


def lose_host(run_dir, kind, lost, number, lost_s, delay_s):
    """Lose a host in the middle of training.

    Every surviving rank must exit with 70 and name the lost host, and if its link is cut, the ranks
    on it must exit with 70 as well and name rank 0's host, whose heartbeats they miss.

    Returns:
        (seconds to the last exit, what went wrong or None).
    """
    with Hosts(number) as hosts:
        job = Job(
            run_dir,
            "train.steps=1000000",
            "checkpoint.every_steps=20",
            f"guard.lost_s={lost_s}",
            size=number,
            hosts=hosts,
            step_s=0.02,
            width=100_000,
        )
        wait_for_steps(job, 3)
        time.sleep(delay_s)
        started = time.monotonic()
        getattr(hosts, kind)(lost)
        while any(map(alive, job.pids)) and time.monotonic() - started < lost_s + 30:
            time.sleep(0.02)
        took_s = time.monotonic() - started
        codes = job.wait(20)
        problems = []
        for rank in range(number):
            out = output_of(job, rank)
            if rank == lost and not LOSSES[kind]:
                continue
            # Rank 0 is what the others hear, and what a host without its link misses.
            missed = f"(h{(0 if lost else 1) if rank == lost else lost})"
            said = [line for line in out.splitlines() if line.startswith("iomm: ")]
            stacks = run_dir / f"stacks-rank{rank}.txt"
            if codes[rank] != DEAD or len(said) != 1 or missed not in said[0] or "Traceback" in out:
                problems.append((rank, codes[rank], out[-1500:]))
            elif kind != "kill" and "File" not in (stacks.read_text() if stacks.exists() else ""):
                problems.append((rank, "no stacks"))
        if took_s > lost_s + BEYOND_S:
            problems.append(f"took {took_s:.1f} s")
    return took_s, ((kind, lost, problems) if problems else None)


def lost_hosts(folder, num_trials, lost_s=30.0, number=3, seed=0):
    """Kill a host, cut a host's link, and lose rank 0's host, num_trials times each.

    Rank 0's host is killed, cut or unplugged in turn. Returns (counts, failures).
    """
    rng, arguments = random.Random(seed), []
    for trial in range(num_trials):
        others = rng.randrange(1, number), rng.randrange(1, number)
        for kind, lost in (
            ("kill", others[0]),
            (("cut", "unplug")[trial % 2], others[1]),
            (("kill", "cut", "unplug")[trial % 3], 0),
        ):
            run_dir = Path(folder) / f"trial{len(arguments)}"
            arguments.append((run_dir, kind, lost, number, lost_s, rng.uniform(0, 0.5)))
    found = in_parallel(lose_host, arguments)
    failures = [problem for _, problem in found if problem]

    def slowest(killed):
        return round(
            max(
                (
                    seconds
                    for (seconds, _), (_, kind, *_) in zip(found, arguments, strict=True)
                    if (kind == "kill") == killed
                ),
                default=0.0,
            ),
            2,
        )

    return {
        "hosts": number,
        "lost_s": lost_s,
        "trials": len(found),
        "exit_70_and_host_named_on_every_survivor": len(found) - len(failures),
        "slowest_s_after_a_kill": slowest(killed=True),
        "slowest_s_after_a_cut": slowest(killed=False),
    }, failures


STEADY = ("train.steps=60", "checkpoint.every_steps=20", "checkpoint.keep=100")


def interrupted_link(run_dir, golden, cut_s, lost_s, step, delay_s):
    """Cut a link for cut_s seconds in a step, and return what differs from an undisturbed run."""
    with Hosts(2) as hosts:
        job = Job(
            run_dir, *STEADY, f"guard.lost_s={lost_s}", hosts=hosts, step_s=0.02, width=100_000
        )
        wait_for_steps(job, step)
        time.sleep(delay_s)
        hosts.cut(step % 2)
        time.sleep(cut_s)
        before = len(log_rows(run_dir))
        hosts.mend(step % 2)
        codes = job.wait(cut_s + 60)
    if codes != [0, 0]:
        return codes, job.out[-1500:], output_of(job, 1)[-1500:]
    if before == len(log_rows(run_dir)):
        return "the cut came too late"
    if final_files(run_dir) != final_files(golden) or log_rows(run_dir) != log_rows(golden):
        return "other losses or another state"
    return None


def returning_links(folder, num_trials, cuts_s=(5.0, 20.0), lost_s=30.0, seed=0):
    """Cut a link for a while in the middle of training, num_trials times for each duration.

    The run must go on and end with the bits of an undisturbed one. Returns (counts, failures).
    """
    rng, golden = random.Random(seed), Path(folder) / "golden"
    assert Job(golden, *STEADY, width=100_000).wait(60) == [0, 0]
    arguments = [
        (
            Path(folder) / f"trial{trial}-{cut_s:g}",
            golden,
            cut_s,
            lost_s,
            rng.randint(3, 40),
            rng.uniform(0, 0.03),
        )
        for trial in range(num_trials)
        for cut_s in cuts_s
    ]
    failures = [found for found in in_parallel(interrupted_link, arguments) if found]
    return {
        "lost_s": lost_s,
        "cut_for_s": list(cuts_s),
        "trials": len(arguments),
        "went_on_with_the_same_bits": len(arguments) - len(failures),
    }, failures


def preempt_host(run_dir, golden, host, number, delay_s):
    """Send SIGTERM to the ranks of one host, and resume on the hosts that are left.

    Returns what went wrong, or None.
    """
    settings = ("train.global_batch=12", "train.micro_batch=2", "checkpoint.every_steps=1000")
    with Hosts(number) as hosts:
        job = Job(
            run_dir,
            *settings,
            "train.steps=100000",
            size=number,
            hosts=hosts,
            step_s=0.02,
            record=True,
        )
        wait_for_steps(job, 3)
        time.sleep(delay_s)
        started = time.monotonic()
        job.kill([host], signal.SIGTERM)
        codes = job.wait(30)
        took_s = time.monotonic() - started
        step = newest_step(run_dir)
        if codes != [REQUEUE] * number or not (
            step == newest_logged_commit(job) == log_rows(run_dir)[-1][0]
        ):
            return took_s, (codes, step, job.out[-1000:])
        hosts.kill(host)
        # The hosts that are left form a new job, whose rank 0 is the first of them.
        left = [i for i in range(number) if i != host]
        hosts.holders = [hosts.holders[i] for i in left]
        hosts.addresses = [hosts.addresses[i] for i in left]
        hosts.processes = [hosts.processes[i] for i in left]
        hosts.number = number - 1
        last = step + 10
        again = Job(
            run_dir,
            *settings,
            f"train.steps={last}",
            size=number - 1,
            hosts=hosts,
            record=True,
        )
        if again.wait(60) != [0] * (number - 1) or f"resumed from step {step}" not in again.out:
            return took_s, output_of(again, 0)[-1000:]
    assert Job(golden, *settings, f"train.steps={last}", size=1, record=True).wait(90) == [0]
    expected, got = samples_of(golden), samples_of(run_dir)
    for found in (expected, got):
        for samples in found.values():
            samples.sort()
    if {n: got[n] for n in range(1, last + 1)} != expected:
        return took_s, "other global batches"
    return took_s, None


def preempted_hosts(folder, num_trials, number=3, seed=0):
    """Preempt one of several hosts at a random moment. Returns (counts, failures)."""
    rng = random.Random(seed)
    arguments = [
        (
            Path(folder) / f"trial{trial}",
            Path(folder) / f"golden{trial}",
            rng.randrange(number),
            number,
            rng.uniform(0, 0.4),
        )
        for trial in range(num_trials)
    ]
    found = in_parallel(preempt_host, arguments)
    failures = [problem for _, problem in found if problem]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "hosts": number,
        "trials": num_trials,
        "same_step_saved_exit_75_and_same_batches_on_the_hosts_left": num_trials - len(failures),
        "slowest_exit_s": round(max(seconds for seconds, _ in found), 2),
    }, failures


class HostsRun:
    """A run of engine/launch.py on all hosts, one rank on each, with a launcher on each host.

    `launcher` is "deepspeed" (with --no_ssh) or "torchrun" (engine/torchrun.py).
    """

    def __init__(
        self, hosts, launcher, run_dir, *arguments, options=(), script=("engine/launch.py",)
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.launcher = launcher
        self.processes, self.paths = {}, {}
        hostfile = Path(f"{run_dir}.hostfile")
        hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
        for i in range(hosts.number):
            if launcher == "deepspeed":
                line = [
                    str(Path(sys.executable).with_name("deepspeed")),
                    *("--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(i)),
                    *("--master_addr", hosts.addresses[0], "--master_port", "29500"),
                ]
            else:
                line = [
                    *(sys.executable, str(ROOT / "engine/torchrun.py"), "--nproc-per-node", "1"),
                    *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.addresses[0]}:29500"),
                    *("--local-addr", hosts.addresses[i], "--nnodes", str(hosts.number), *options),
                ]
            line += [str(ROOT / script[0]), *script[1:], *arguments, f"run.dir={run_dir}"]
            self.paths[i] = Path(f"{run_dir}.h{i}.out")
            with open(self.paths[i], "ab") as file:
                self.processes[i] = hosts.start(
                    i,
                    line,
                    env={**environment(), **hosts.environment()},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

    def output(self, i):
        """Return what host i has printed."""
        return self.paths[i].read_text(errors="replace")

    def wait_for_steps(self, number):
        """Wait until the run has logged a number of steps."""
        until = time.monotonic() + LIMIT_S
        while len(rows(self.run_dir / "log.jsonl")) < number:
            running = all(process.poll() is None for process in self.processes.values())
            assert running and time.monotonic() < until, self.output(0)[-3000:]
            time.sleep(0.05)

    def wait(self, limit_s=LIMIT_S):
        """Return {host: exit code of its launcher}; None for one that had to be killed."""
        until, codes = time.monotonic() + limit_s, {}
        for i, process in self.processes.items():
            try:
                codes[i] = process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                codes[i] = None
                process.kill()
        return codes


def toy_hosts(folder, steps=20, sizes=(1, 2, 3, 4)):
    """Train 20 steps of the toy job on one to four hosts, in micro-batches of one sample.

    Returns the figures of hosts_train().
    """
    found, golden = {}, None
    settings = (f"train.steps={steps}", "train.global_batch=12", "train.micro_batch=1")
    for number in sizes:
        run_dir = Path(folder) / str(number)
        with Hosts(number) as hosts:
            job = Job(run_dir, *settings, size=number, hosts=hosts, record=True)
            assert job.wait(120) == [0] * number, job.out[-2000:]
        result = samples_of(run_dir), [float.fromhex(row[1]) for row in log_rows(run_dir)]
        golden = golden or result
        if number > 1:
            found[f"{number} hosts"] = like_golden(result, golden, steps)
    return found


def like_golden(result, golden, steps):
    """Compare (samples, losses) with those of one host."""
    (samples, losses), (expected, reference) = result, golden
    return {
        "samples_in_order": samples == expected and len(losses) == steps,
        "first_loss_bitwise": losses[0] == reference[0],
        "worst_relative": max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)),
    }


def hosts_train(folder, sizes=(1, 2, 3, 4)):
    """Train 20 steps on one to four hosts.

    Stage 1 runs with both launchers, stage 2 (a mixture of images and pairs) with DeepSpeed's, both
    under ZeRO-3 in fp32. The samples must have the order of one host, and the first loss, of the
    same weights, must be bitwise equal; later ones differ by the rounding of sums over ranks.
    """
    small = [
        *small_run(folder),
        "zero.stage=3",
        "train.steps=20",
        "train.global_batch=12",
        "train.micro_batch=1",
    ]
    small.remove("train.global_batch=4")
    stages = {
        "stage 1": small,
        "stage 2": [*small, "train.data=mix", f"data.pairs={folder}/shapes"],
    }
    found, golden = {}, {}
    for stage, launcher, number in [
        *(("stage 1", "deepspeed", number) for number in sizes),
        *(("stage 1", "torchrun", number) for number in sizes[1:]),
        *(("stage 2", "deepspeed", number) for number in sizes[:2]),
    ]:
        run_dir = Path(folder) / f"{stage}-{launcher}-{number}".replace(" ", "-")
        with Hosts(number) as hosts:
            script = ("tests/faults/broken.py", "none", "0", "0")
            run = HostsRun(hosts, launcher, run_dir, *stages[stage], script=script)
            codes = run.wait(LIMIT_S * 2)
        assert set(codes.values()) == {0}, (codes, run.output(0)[-3000:])
        result = entries(run_dir), [float.fromhex(row[1]) for row in log_rows(run_dir)]
        if stage not in golden:
            golden[stage] = result
            continue
        found[f"{stage}, {launcher}, {number} hosts"] = like_golden(result, golden[stage], 20)
    return found


def bad_network(folder, num_steps=200, delay_s=0.1, loss=0.01):
    """Train where every packet takes delay_s and a share of them is lost.

    No alarm may be raised, and losses and state must be those of an undisturbed run.
    """
    settings = (f"train.steps={num_steps}", "checkpoint.every_steps=50")
    assert Job(Path(folder) / "golden", *settings, width=10_000).wait(120) == [0, 0]
    run_dir, started = Path(folder) / "run", time.monotonic()
    with Hosts(2, delay_s=delay_s, loss=loss) as hosts:
        job = Job(run_dir, *settings, hosts=hosts, width=10_000)
        codes = job.wait(60 + 8 * num_steps)
    golden = Path(folder) / "golden"
    alarms = [
        line for rank in (0, 1) for line in output_of(job, rank).splitlines() if "iomm: " in line
    ]
    assert codes == [0, 0], (codes, alarms)
    return {
        "steps": num_steps,
        "delay_ms": round(delay_s * 1000),
        "lost_packets": f"{loss:.0%}",
        "alarms": len(alarms),
        "same_bits": final_files(run_dir) == final_files(golden)
        and log_rows(run_dir) == log_rows(golden),
        "seconds": round(time.monotonic() - started),
    }


# Small enough that weights are gathered and gradients are reduced in several messages.
WIRE = (
    "optim.kind=adamw",
    "zero.max_live_parameters=1000000",
    "zero.prefetch_bucket_size=300000",
    "zero.reduce_bucket_size=400000",
)


def wire(folder, steps=20, sizes=(2, 3, 4), stages=(0, 1, 2, 3), precision="fp32"):
    """Compare the bytes on the wire with the count of benchmarks/lib/traffic.py.

    Measures 20 steps of two micro-batches at each ZeRO stage. Bytes are those of one host and step,
    a mean over hosts; measured ones include headers.
    """
    found = {"steps": steps, "precision": precision}
    for number in sizes:
        results = Path(folder) / str(number)
        results.mkdir(parents=True)
        with Hosts(number) as hosts:
            facts = {
                "hosts": [hosts.facts(i) for i in range(number)],
                "folder": str(results),
                "stages": stages,
                "steps": steps,
                "overrides": [f"precision={precision}", *WIRE],
            }
            subprocess.run(
                [sys.executable, str(ROOT / "tests/faults/wire.py"), json.dumps(facts)],
                env=environment(),
                check=True,
            )
        by_rank = [json.loads((results / f"{rank}.json").read_text()) for rank in range(number)]
        for stage, of_ranks in zip(stages, zip(*by_rank, strict=True), strict=True):
            measured = sum(rank["bytes"] for rank in of_ranks) / number / steps
            counted = sum(of_ranks[0]["counted"].values())
            found[f"stage {stage}, {number} hosts"] = {
                "counted_bytes": counted,
                "measured_bytes": round(measured),
                "more": round(measured / counted - 1, 4),
                "packets": round(sum(rank["packets"] for rank in of_ranks) / number / steps),
            }
    return found
