"""A toy training job with real processes and a linear model in place of DeepSpeed.

The processes communicate over gloo and run the real loop, checkpoints, loss guard and watchdog.
They are forked from a server that has torch loaded, which makes a start take a fraction of a
second.
"""

import atexit
import faulthandler
import functools
import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from namespaces import enter_host
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine import loop
from iomm.engine import state as run_state
from iomm.engine.config import parse, positive
from iomm.engine.data.bad_samples import BadSamples
from iomm.engine.data.samplers import EpochPermutation
from iomm.engine.observe.metrics import Metrics
from iomm.engine.parallel.ema import Ema
from iomm.engine.parallel.ranks import Ranks
from iomm.engine.parallel.zero_layouts import Place
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer
from iomm.engine.resilience.loss_guard import LossGuard
from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import REFUSED, Watchdog, alive

TESTS = Path(__file__).resolve().parents[1]

# tqdm's own lock would be a semaphore, which a killed process leaves behind.
tqdm.set_lock(threading.RLock())


class Linear:
    """Replace zero.Sharded by a linear model with Adam in fp32.

    Parameters are cut into equal padded pieces, and gathered for every pass. `inject(place)` is
    called in the middle of each part of a step.
    """

    shapes: ClassVar = {"layer.weight": (13, 7), "layer.bias": (13,), "odd": (5,)}

    def __init__(self, ranks, accumulation, width=1, inject=lambda place: None):
        self.ranks = ranks
        self.accumulation = accumulation
        self.passes = 0
        self.lr = 0.0
        self.norm = None
        self.inject = inject
        self.shapes = {**self.shapes, "wide": (width,)}
        pieces = []
        for i, shape in enumerate(self.shapes.values()):
            whole = torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + i)
            numel = -(-whole.numel() // ranks.size)
            padded = torch.nn.functional.pad(whole, (0, numel * ranks.size - whole.numel()))
            pieces.append(padded[ranks.rank * numel : (ranks.rank + 1) * numel])
        self.sizes = [len(p) for p in pieces]
        self.places, offset = {}, 0
        for (name, shape), size in zip(self.shapes.items(), self.sizes, strict=True):
            start = ranks.rank * size
            numel = max(0, min(size, torch.Size(shape).numel() - start))
            self.places[name] = Place(group=0, offset=offset, numel=numel, start=start)
            offset += size
        self.masters = [torch.cat(pieces)]
        self.moments = {
            "exp_avg": [torch.zeros_like(self.masters[0])],
            "exp_avg_sq": [torch.zeros_like(self.masters[0])],
        }
        self.optimizer_step, self.gradient = 0, None

    def slots(self):
        return {"master": self.masters, **self.moments}

    def finish_restore(self, optimizer_step):
        self.optimizer_step = optimizer_step

    def set_lr(self, lr):
        self.lr = lr

    @property
    def last_micro_batch(self):
        return (self.passes + 1) % self.accumulation == 0

    def __call__(self, pixels, vit_pixels, n_B, *_):
        gathered = [torch.empty_like(self.masters[0]) for _ in range(self.ranks.size)]
        dist.all_gather(gathered, self.masters[0])
        self.inject("forward")
        by_rank = [g.split(self.sizes) for g in gathered]
        self.wholes = [
            torch.cat([pieces[i] for pieces in by_rank])[: torch.Size(shape).numel()]
            .view(shape)
            .requires_grad_()
            for i, shape in enumerate(self.shapes.values())
        ]
        weight, bias, odd, wide = self.wholes
        x_BI = torch.sin(n_B[:, None] * torch.arange(1, 8) * 0.37)
        y_BO = torch.tanh(x_BI @ weight.T + bias) + odd.sum() * 0.01 + wide[:3].sum() * 0.01
        loss_B = (y_BO - torch.cos(n_B[:, None] * 0.11 + torch.arange(13))).square().mean(
            1
        ) * pixels
        return loss_B.mean(), loss_B, (n_B * 0.618) % 1

    def backward(self, loss):
        (loss / self.accumulation).backward()
        self.inject("backward")
        flat = []
        for p, size in zip(self.wholes, self.sizes, strict=True):
            g = p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            flat.append(torch.nn.functional.pad(g, (0, size * self.ranks.size - len(g))))
        self.gradient = (
            flat
            if self.gradient is None
            else [a + b for a, b in zip(self.gradient, flat, strict=True)]
        )

    def step(self):
        boundary, self.passes = self.last_micro_batch, self.passes + 1
        if not boundary:
            return False
        whole = torch.cat(self.gradient) / self.ranks.size
        dist.all_reduce(whole)
        self.gradient, self.norm = None, float(whole.norm())
        if not torch.tensor(self.norm).isfinite():
            return False
        pieces = whole.split([size * self.ranks.size for size in self.sizes])
        r = self.ranks.rank
        mine = torch.cat(
            [g[r * size : (r + 1) * size] for g, size in zip(pieces, self.sizes, strict=True)]
        )
        self.optimizer_step += 1
        m, v = self.moments["exp_avg"][0], self.moments["exp_avg_sq"][0]
        m.lerp_(mine, 0.1)
        self.inject("step")
        v.lerp_(mine * mine, 0.05)
        self.masters[0] -= self.lr * m / (v.sqrt() + 1e-8)
        return True

    def grad_norm(self):
        return self.norm


class Source:
    """Yield micro-batches in the order of the real loader.

    An epoch has NUM_SAMPLES samples in two shards. Each step takes at least the option step_s. With
    the option `record`, every rank writes its samples as lines [step, micro-batch, [sample, ...]].
    """

    # Not a multiple of the batch, therefore some epochs end in the middle of a step.
    NUM_SAMPLES = 84

    def __init__(self, ranks, config, options, inject):
        self.ranks = ranks
        self.options = options
        self.inject = inject
        self.start_step = 0
        self.batch = config.train.global_batch
        self.order = EpochPermutation(config.run.seed, [50, self.NUM_SAMPLES - 50])
        self.micro = config.train.micro_batch or self.batch // ranks.size
        self.accumulation_steps = self.batch // (self.micro * ranks.size)
        self.samples = Path(config.run.dir) / f"samples-rank{ranks.rank}.jsonl"

    def __iter__(self):
        step = self.start_step
        while True:
            step += 1
            for micro in range(self.accumulation_steps):
                time.sleep(
                    self.options.get("step_s", 0.0)
                    * (10 if step == self.options.get("slow_step") else 1)
                )
                if micro == self.accumulation_steps - 1:
                    self.inject("data")
                first = (step - 1) * self.batch + (
                    micro * self.ranks.size + self.ranks.rank
                ) * self.micro
                n_B = torch.as_tensor(self.order(torch.arange(first, first + self.micro).numpy()))
                if self.options.get("record"):
                    with open(self.samples, "a") as file:
                        print(json.dumps([step, micro, n_B.tolist()]), file=file)
                nan = step in self.options.get("nan_steps", ()) and self.ranks.rank == 0
                yield SimpleNamespace(
                    inputs=(float("nan") if nan else 1.0, None, n_B),
                    n_B=n_B,
                    wait_s=0.0,
                    failures=[],
                )


def digest(shapes, whole):
    """Return the SHA-256 over whole(slot, name) of every slot and unsharded parameter."""
    total = hashlib.sha256()
    for slot in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in sorted(shapes):
            total.update(whole(slot, name).contiguous().numpy().tobytes())
    return total.hexdigest()


def live_digest(state):
    """Return the digest of the present state of all ranks."""
    places = state.sharded.places
    parts = state.ranks.all(
        {key: (places[key[1]].start, view.numpy().copy()) for key, view in state.tensors().items()}
    )

    def whole(slot, name):
        pieces = sorted(
            (part[slot, name] for part in parts if (slot, name) in part), key=lambda piece: piece[0]
        )
        flat = torch.from_numpy(np.concatenate([values for _, values in pieces]))
        return flat[: torch.Size(state.sharded.shapes[name]).numel()]

    return digest(state.sharded.shapes, whole)


class Pause:
    """Replace evaluation.Evaluation by a pause.

    After step evaluate_at it takes evaluate_s, or fails on the ranks evaluate_fails.
    """

    def __init__(self, options):
        self.options = options

    def due(self, step):
        return step == self.options.get("evaluate_at")

    def __call__(self, state):
        if state.ranks.rank in self.options.get("evaluate_fails", ()):
            raise MemoryError("the pictures are too large")
        time.sleep(self.options["evaluate_s"])
        return {"heldout_loss": {}}


def read_fifo():
    path = f"/tmp/iomm-fifo-{os.getpid()}"
    os.mkfifo(path)
    try:
        Path(path).read_text()
    finally:
        os.unlink(path)


def hold_the_gil():
    import ctypes

    # PyDLL does not release the GIL during a call.
    ctypes.PyDLL(None).sleep(600)


def wait_for_a_dead_worker():
    import queue

    queue.Queue().get()


FAULTS = {
    # The process stops a moment after the call returns.
    "stop": lambda: (os.kill(os.getpid(), signal.SIGSTOP), time.sleep(30)),
    "lock": hold_the_gil,
    "fifo": read_fifo,
    "worker": wait_for_a_dead_worker,
    "mismatch": lambda: dist.barrier(),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "mistake": lambda: positive("a size", 0),
}


def work(rank, size, run_dir, rendezvous, overrides, options, parent):
    """Run one rank as engine/launch.py does."""
    torch.set_num_threads(1)
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    out = os.open(run_dir / f"out-rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.getLogger("iomm")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    faulthandler.enable()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    ranks = Ranks(
        rank=rank,
        local_rank=rank,
        local_size=size,
        size=size,
        device=torch.device("cpu"),
        control_group=dist.new_group(backend="gloo"),
    )
    config = parse(
        "",
        overrides=[
            "train.global_batch=8",
            "optim.lr=0.05",
            "optim.warmup_steps=0",
            "ema.decay=0.9",
            "log.every_steps=100000",
            f"run.dir={run_dir}",
            *overrides,
        ],
    )
    code, state = 1, None

    def inject(place):
        """Cause the fault options["fault"], {step, ranks, kind, place}.

        It occurs in the first read of a checkpoint, in the first save from that step on, or in that
        step.
        """
        fault = options.get("fault")
        if not fault or fault["place"] != place or rank not in fault["ranks"]:
            return
        if place == "load" or (
            state.step >= fault["step"] if place == "save" else state.step + 1 == fault["step"]
        ):
            FAULTS[fault["kind"]]()

    def injecting(real, place):
        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            inject(place)
            return result

        return call

    write = checkpoint_writer.write_safetensors

    def write_slowly(*args):
        time.sleep(options.get("disk_s", 0.0))
        return write(*args)

    # The fault in a save occurs between writing and reading back.
    checkpoint_writer.write_safetensors = injecting(write_slowly, "save")
    checkpoint_reader.Reader.piece = injecting(checkpoint_reader.Reader.piece, "load")
    try:
        guard = config.guard
        with Watchdog(ranks, run_dir, guard.hang_s, guard.lost_s, parent) as watchdog:
            ranks.on_first(lambda: checkpoint_writer.lock_run_dir(run_dir))
            folder = checkpoint_reader.newest(run_dir / "checkpoints", ranks)
            source = Source(ranks, config, options, inject)
            sharded = Linear(ranks, source.accumulation_steps, options.get("width", 1), inject)
            loss_guard = LossGuard(
                config.guard.max_skips, config.guard.spike_sigmas, config.guard.skip_spikes
            )
            state = run_state.State(
                sharded,
                Ema(sharded.masters, config.ema.decay),
                loss_guard,
                BadSamples(1.0, 10**9, None),
                ranks,
                options.get("data"),
            )
            if folder is not None:
                run_state.restore(state, folder)
                state_digest = live_digest(state) if options.get("record") else ""
                print(f"resumed from step {state.step} {state_digest}", flush=True)
            source.start_step = state.step
            saver = checkpoint_writer.Saver(
                run_dir / "checkpoints",
                ranks.with_own_group(),
                keep=config.checkpoint.keep,
                keep_every_steps=config.checkpoint.keep_every_steps,
                background=config.checkpoint.background,
            )
            metrics = (
                Metrics(
                    run_dir,
                    flops_per_image=1,
                    global_batch=8,
                    num_steps=config.train.steps,
                    ranks=ranks,
                    start_step=state.step,
                    gpu_hours=0.0,
                )
                if ranks.first
                else None
            )
            code = (
                0
                if loop.train(
                    state, source, config, saver, watchdog, metrics, evaluation=Pause(options)
                )
                else REQUEUE
            )
    except InputError:
        code = REFUSED
    except Exception:
        traceback.print_exc()
    os._exit(code)


def launcher(run_dir, rendezvous, size, overrides, options, answers, hosts=None):
    """Fork the ranks and write their process ids, and at the end their exit codes, to a pipe.

    hosts: for each rank what namespaces.enter_host() takes. None: all are on this machine.
    Kills the other ranks 15 s after one has failed. DeepSpeed's launcher does so after 1 s, too
    soon to observe what the ranks do by themselves.
    """
    pids, codes, parent = [], {}, os.getpid()
    for rank in range(size):
        fork = os.fork if hosts is None else functools.partial(enter_host, hosts[rank])
        pid = fork()
        if pid == 0:
            os.close(answers)
            if hosts is not None:
                # Processes of another PID namespace do not see their parent.
                parent = 0
            work(rank, size, run_dir, rendezvous, overrides, options, parent)
        pids.append(pid)
    os.write(answers, (json.dumps(pids) + "\n").encode())
    failed_at = None
    while len(codes) < size:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                failed_at = failed_at or (time.monotonic() if codes[pid] else None)
            elif failed_at and time.monotonic() - failed_at > 15:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    os.write(answers, (json.dumps([codes[pid] for pid in pids]) + "\n").encode())
    os._exit(0)


def serve():
    """Fork a launcher for each line of stdin, which has one start, and print its pid."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # TensorBoard takes seconds to import.
    Metrics.open_board = lambda self, start_step: None
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answers = os.open(request.pop("answers"), os.O_WRONLY)
            launcher(**request, answers=answers)
        print(pid, flush=True)


# Tests run two chains of jobs at once, which share the server.
SERVER_LOCK = threading.Lock()


@functools.cache
def server():
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "helpers")])
    process = subprocess.Popen(
        [sys.executable, "-c", "from faults.toy_job import serve; serve()"],
        text=True,
        bufsize=1,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    atexit.register(process.kill)
    return process


class Job:
    """Ranks 0 ... size - 1 of one start.

    `out` is the output of rank 0 in this run directory so far, earlier starts included.
    """

    def __init__(self, run_dir, *overrides, size=2, hosts=None, **options):
        """`hosts`: namespaces.Hosts with `size` hosts, one rank on each."""
        self.run_dir = Path(run_dir)
        name = f"/tmp/iomm-toy-{uuid.uuid4().hex}"
        os.mkfifo(f"{name}-answers")
        pipe = os.open(f"{name}-answers", os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(pipe, True)
        request = {
            "run_dir": str(run_dir),
            "rendezvous": f"{name}-rendezvous",
            "size": size,
            "overrides": overrides,
            "options": options,
            "answers": f"{name}-answers",
            "hosts": hosts and [hosts.facts(rank % hosts.number) for rank in range(size)],
        }
        with SERVER_LOCK:
            server().stdin.write(json.dumps(request) + "\n")
            self.launcher = int(server().stdout.readline())
        while not select.select([pipe], [], [], 10)[0]:
            raise AssertionError("no ranks were started within 10 s")
        self.answers = os.fdopen(pipe)
        self.pids = json.loads(self.answers.readline())
        os.unlink(f"{name}-answers")
        self.rendezvous = Path(f"{name}-rendezvous")

    @property
    def out(self):
        path = self.run_dir / "out-rank0.txt"
        return path.read_text() if path.exists() else ""

    def kill(self, ranks, number=signal.SIGKILL):
        for rank in ranks:
            if alive(self.pids[rank]):
                os.kill(self.pids[rank], number)

    def wait(self, limit_s=60):
        """Wait for the ranks to end, and return their exit codes.

        If one still runs after limit_s, or the launcher is dead, all are killed and the codes are
        None.
        """
        until = time.monotonic() + limit_s
        while any(map(alive, self.pids)) and time.monotonic() < until:
            time.sleep(0.01)
        late = any(map(alive, self.pids))
        self.kill(range(len(self.pids)))
        # The line is empty if the launcher was killed.
        line = self.answers.readline()
        self.answers.close()
        self.rendezvous.unlink(missing_ok=True)
        return [None] * len(self.pids) if late or not line else json.loads(line)
