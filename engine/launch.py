"""Start training: deepspeed engine/launch.py --stage pretrain [--config NAME] [--resume auto] [section.key=value ...]"""

import os
import sys
from pathlib import Path

if __name__ == "__main__" and "RANK" in os.environ:
    # now: torch takes seconds to load, and the launcher may be gone then
    os.environ["IOMM_PARENT"] = str(os.getppid())
from iomm.checkout import enter

enter(__file__)

from iomm.engine.parallel import cpu_ranks

if __name__ == "__main__":
    cpu_ranks.die_with_rank_0()

import argparse
import ctypes
import platform
import shlex
import socket

import torch

from iomm.config import InputError, choice
from iomm.engine import builders, dry_run, loop
from iomm.engine import state as run_state
from iomm.engine.config import differences, flat, load_config
from iomm.engine.data.atomic import whole_file
from iomm.engine.data.bad_samples import BadSamples
from iomm.engine.evaluation.heldout import Evaluation, load_hook
from iomm.engine.evaluation.sample import sample_run
from iomm.engine.evaluation.shapes_grades import grade_run
from iomm.engine.observe.doctor import write_machine
from iomm.engine.observe.metrics import Metrics, check_wandb
from iomm.engine.observe.ranklog import RankLog
from iomm.engine.observe.tracing import Window
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel import zero
from iomm.engine.parallel.ema import Ema
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer
from iomm.engine.resilience.checkpoint_interval import advice
from iomm.engine.resilience.inductor_cache import remove_half_compiled
from iomm.engine.resilience.loss_guard import LossGuard
from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import REFUSED, Watchdog
from iomm.kernels import dispatch, fp8_linear

# Of malloc.h: number and value. No memory of its own for a large block, trim the heap above 2 GiB free, grow it by 256 MiB.
M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = (-4, 0), (-1, 2**31 - 1), (-2, 2**28)
# And the config that each takes by default.
STAGES = {"pretrain": "demo", "finetune": "demo-finetune"}


def main(argv=None, start_peers=False):
    """start_peers: whether this process may start the other ranks of train.cpu_ranks with its own command line.

    Exit code: 0 done, 2 something that the user gave is wrong (one line on stderr, said by rank 0 or by one that names
    itself), 75 asked to stop by SIGTERM or SIGUSR1 and saved: start again with --resume auto; 70 a rank or the launcher
    died, 71 a hang.
    """
    rank = int(os.environ.get("RANK", 0))
    # One a machine, until the ranks have met.
    speaks = not rank or os.environ.get("LOCAL_RANK") == "0"
    try:
        args = parse_args(argv)
        choice("--stage", args.stage, tuple(STAGES))
        choice("--profile", args.profile, ("none", "nsys", "torch"))
        for name in ("config", "init", "hook", "resume"):
            if getattr(args, name) == "":
                raise InputError(
                    f"--{name} is empty: give a value (a variable of the shell that is not set?), or leave it out"
                )
        if args.dry_run is not None and args.dry_run < 1:
            raise InputError(f"--dry-run must be a number of GPUs, 1 or more, got {args.dry_run}")
        config = load_config(
            args.config or STAGES[args.stage],
            args.overrides + [f"run.init={args.init}"] * bool(args.init),
        )
        if args.stage == "finetune" and config.run.init is None:
            raise InputError(
                "--stage finetune starts from a run of stage 1: give --init RUN, the run.dir of that run"
            )
        _, device = group.take_device(args.local_rank)
        check_kernels(config.precision)
        if config.log.wandb:
            check_wandb()
        if args.dry_run is not None:
            if not rank:
                print(dry_run.describe(dry_run.make_plan(config, args.dry_run), config))
            return 0
        size = cpu_ranks.num_ranks(config.train, device.type) if start_peers else 1
        with (
            cpu_ranks.Peers(size, cpu_ranks.num_threads(config.train, size)),
            RankLog(config.run.dir),
        ):
            ranks = group.start(config.train.timeout_s, args.local_rank)
            with Watchdog(
                ranks, config.run.dir, config.guard.hang_s, int(os.environ.get("IOMM_PARENT", 0))
            ) as watch:
                # The watch does
                speaks = False
                return 0 if run(config, args, ranks, watch) else REQUEUE
    except InputError as error:
        if speaks:
            who = f"rank {rank} ({socket.gethostname()}): " if rank else ""
            print(f"iomm: {who}{error}", file=sys.stderr, flush=True)
        if os.environ.get("IOMM_TRACEBACK"):
            raise
        return REFUSED
    except KeyboardInterrupt:
        return 130
    finally:
        group.stop()


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", default="pretrain", help=f"one of: {', '.join(STAGES)}")
    parser.add_argument(
        "--config",
        help="name of a file in engine/configs, or a path ending in .yaml; default: the stage's demo",
    )
    parser.add_argument(
        "--init",
        help="run folder to start from: its newest weights (run.init_weights), all else fresh",
    )
    parser.add_argument(
        "--resume",
        default="none",
        help="none, auto (newest intact checkpoint of run.dir, if any), or a checkpoint folder",
    )
    parser.add_argument(
        "--profile",
        default="none",
        help="none, nsys, or torch: trace profile.num_steps from profile.start_step on",
    )
    parser.add_argument(
        "--hook",
        metavar="package.module:function",
        help="called on rank 0 after each evaluation with (config, step, images, prompts); the numbers that it "
        "returns by name are logged",
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=8,
        metavar="GPUS",
        help="check config and paths, print parameters, memory and work for so many GPUs (default 8), and stop",
    )
    # The launcher adds it.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    return args


def check_kernels(precision):
    """Raises InputError if IOMM_KERNELS asks for a body that is unknown or cannot run here, or precision for a GPU's fp8."""
    if precision == "fp8" and (reason := fp8_linear.why_not()):
        raise InputError(
            f"precision fp8 on this GPU ({torch.cuda.get_device_name()}) {reason}: set precision=bf16"
        )
    try:
        dispatch.table("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise InputError(str(error)) from error


def run(config, args, ranks, watch):
    """Builds every part, hands over to the loop -> whether that came to the end."""
    say = print if ranks.first else lambda *_, **__: None
    prepare_process(config, ranks)
    hook = load_hook(args.hook) if args.hook else None
    ranks.on_first(lambda: open_run_dir(config, args))
    folder = choose_checkpoint(config, args, ranks)
    ranks.on_first(lambda: write_config(config))
    state, source, flops = build(config, ranks, folder, say)
    # It may be an earlier one of this very run.
    if args.resume not in ("none", "auto"):
        ranks.on_first(
            lambda: checkpoint_writer.set_aside(Path(config.run.dir) / "checkpoints", state.step)
        )
    metrics = (
        Metrics(
            config.run.dir,
            flops_per_image=flops,
            global_batch=config.train.global_batch,
            num_steps=config.train.steps,
            ranks=ranks,
            start_step=state.step,
            gpu_hours=state.gpu_hours,
            tokens_per_image=dry_run.tokens(state.sharded.engine.module, config),
            wandb=config.log.wandb,
            settings=flat(config),
        )
        if ranks.first
        else None
    )
    if metrics is not None:
        metrics.careful("machine.json", write_machine, config.run.dir, ranks.size)
    window = Window(
        args.profile,
        state.step + config.profile.start_step,
        config.profile.num_steps,
        config.run.dir,
        ranks,
    )
    saver = checkpoint_writer.Saver(
        Path(config.run.dir) / "checkpoints",
        ranks.with_own_group(),
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_steps,
        background=config.checkpoint.background,
    )
    evaluation = Evaluation(config, source, ranks, hook) if config.evaluate.every_steps else None
    if loop.train(state, source, config, saver, watch, metrics, window, evaluation):
        # The other ranks of this machine wait.
        if ranks.device.type == "cpu":
            torch.set_num_threads(cpu_ranks.num_threads(config.train, 1))
        ranks.on_first(lambda: finish(config, args, metrics, saver, ranks))
        return True
    say(f"stopped as asked; step {state.step} is saved: start again with --resume auto")
    return False


def prepare_process(config, ranks):
    """Threads of this rank, and memory on a CPU: glibc gives every large tensor back to the system and gets it again page
    by page, a tenth of a step of demo-cpu; kept, the pages are there already. Elsewhere than on glibc nothing happens.
    """
    torch.set_num_threads(cpu_ranks.num_threads(config.train, ranks.local_size))
    if ranks.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        for option, value in M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD:
            ctypes.CDLL(None).mallopt(option, value)


def build(config, ranks, folder=None, say=print):
    """Data, frozen parts, trained parts, optimizer -> (run_state.State, its source of batches, FLOPs that one image needs). Called
    by all ranks together. The state is that of the checkpoint `folder`, or fresh, or of run.init's weights.
    """
    adamw = zero.adamw_backend(config.optim.adamw, ranks.device)
    config.zero.check_ranks(ranks.size)
    index_dir = pairs_dir = None
    if config.train.data != "pair":
        index_dir = ranks.on_first(lambda: builders.prepare_data(config))
    if config.train.data != "image":
        pairs_dir = ranks.on_first(lambda: builders.prepare_data(config, pairs=True))
    for line in builders.foreign_data(config):
        say(line)
    model = builders.build_model(config, ranks.device)
    mllm, vae = model.frozen
    source = builders.open_source(
        config, ranks, mllm, vae, index_dir=index_dir, pairs_dir=pairs_dir
    )
    if ranks.first:
        threads = torch.get_num_threads()
        say(
            f"{len(source.shards)} images, {ranks.size} rank{'s' * (ranks.size > 1)} on {ranks.device.type}, {threads} thread"
            f"{'s' * (threads > 1)} each, {config.precision}, ZeRO-{config.zero.stage}; "
            f"trained parameters {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        )
        say(dispatch.format_table(ranks.device.type))
        say(
            "\n".join(
                dry_run.memory_table(dry_run.memory(model, config, ranks.size, source.micro_batch))
            )
        )
    if config.run.init is not None and folder is None:
        say(start_from(config, model, ranks))
    if config.precision == "fp8":
        say(
            "precision fp8 has not been compared on a GPU yet: no record says that its loss follows bf16's "
            "(python benchmarks/studies/precision.py makes one)"
        )
    flops = sum(dry_run.work(model, config).values())
    compiled = config.train.compiled(ranks.device)
    if compiled:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        # And nobody compiles before.
        ranks.all(remove_half_compiled(cache_dir()) if ranks.local_rank == 0 else None)
    model.prepare_blocks(
        compiled=compiled, recompute=config.train.recompute, fp8=config.precision == "fp8"
    )
    sharded = zero.Sharded(
        model.to(ranks.device),
        lambda module: make_optimizer(module, config.optim, adamw),
        config=config,
        ranks=ranks,
        leaves=model.leaves,
        micro_batch=source.micro_batch,
        accumulation=source.accumulation_steps,
    )
    skips = BadSamples(
        config.data.max_bad_fraction,
        config.data.max_bad_shards,
        Path(config.run.dir) / "skipped.jsonl" if ranks.first else None,
    )
    state = run_state.State(
        sharded,
        Ema(sharded.masters, config.ema.decay),
        make_guard(config),
        skips,
        ranks,
        ranks.on_first(lambda: builders.data_facts(source.shards)),
    )
    if folder is not None:
        run_state.restore(state, folder)
        say(f"resumed from {folder}: step {state.step} of {config.train.steps}")
    source.start_step = state.step
    return state, source, flops


def start_from(config, model, ranks):
    """Loads the weights of run.init into the model -> a line that says which. Called by all ranks together."""
    _, folder = builders.read_run(config.run.init, ranks)
    averaged = builders.load_weights(model, folder, config.run.init_weights)["ema"]
    return f"starts from the {config.run.init_weights if averaged else 'raw'} weights of {folder}"


def make_guard(config):
    return LossGuard(config.guard.max_skips, config.guard.spike_sigmas, config.guard.skip_spikes)


def open_run_dir(config, args):
    """Checks that run.dir is of this config and takes it. Work for rank 0."""
    run_dir = Path(config.run.dir)
    if (run_dir / "config.yaml").is_file():
        changed = differences(config, load_config(str(run_dir / "config.yaml")))
        if changed:
            raise InputError(
                f"{run_dir} is the run of another config ({'; '.join(changed)}): "
                "give the same values to resume it, or choose another run.dir, there with --resume "
                f"{run_dir}/checkpoints/step-N to go on from one of its checkpoints"
            )
    if args.resume == "none" and checkpoint_reader.steps(run_dir / "checkpoints"):
        raise InputError(
            f"{run_dir} already holds a run: add --resume auto to go on with it, or choose another run.dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint_writer.lock_run_dir(run_dir)
    except OSError as error:
        raise InputError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error


def choose_checkpoint(config, args, ranks):
    """The checkpoint to resume from, found intact by all ranks together, or None."""
    if args.resume == "none":
        return None
    if args.resume != "auto":
        problem = checkpoint_reader.verify(args.resume, ranks)
        if problem:
            raise InputError(f"--resume {args.resume}: {problem}")
        return args.resume
    checkpoints = Path(config.run.dir) / "checkpoints"
    folder = checkpoint_reader.newest(checkpoints, ranks)
    if folder is None:
        if ranks.on_first(lambda: bool(checkpoint_reader.steps(checkpoints))):
            raise InputError(
                f"no checkpoint under {checkpoints} is intact: choose another run.dir to start anew"
            )
        if ranks.first:
            print(f"no checkpoint under {checkpoints} yet: starting at step 0")
    return folder


def write_config(config):
    saved = Path(config.run.dir) / "config.yaml"
    try:
        with whole_file(saved) as partial:
            partial.write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{saved} cannot be written: {error.strerror}") from error


def finish(config, args, metrics, saver, ranks):
    """Draws the sample grid from the checkpoint just written, scores it in the shapes world, and says what to type next. The
    run is complete, whatever fails in here.
    """
    run_dir = config.run.dir
    try:
        if config.log.sample_images:
            path = sample_run(
                run_dir,
                num=config.log.sample_images,
                steps=config.log.sample_steps,
                device=ranks.device,
            )
            metrics.image("samples", path, config.train.steps)
            print(f"samples     {path}")
            if config.data.shards == config.model.mllm == "shapes":
                print(grade_run(run_dir, steps=config.log.sample_steps, device=ranks.device))
    except Exception as error:
        # of whatever kind: too little memory, no room on the disk
        print(
            f"samples     not drawn or not scored: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
    if report := metrics.report():
        print(f"report      {report}")
    metrics.close()
    again = [
        f"--{name} {shlex.quote(value)}"
        for name in ("config", "init", "hook")
        if (value := getattr(args, name))
    ]
    again += [shlex.quote(o) for o in args.overrides if not o.startswith("train.steps=")]
    stage_1 = args.stage == "pretrain"
    if saver.folder is not None:
        print(
            f"checkpoint  {saver.folder}: {saver.bytes / 2**20:.0f} MiB in {saver.write_s:.1f} s, training waited "
            f"{saver.stall_s:.2f} s\n            {advice(config, metrics, saver, ranks.size)}"
        )
    print(
        f"log         {run_dir}/log.jsonl, {run_dir}/tb (tensorboard --logdir {run_dir}/tb)\n"
        f"GPU-hours   {metrics.gpu_hours:.3f}\n"
        f"next        iomm sample --run {run_dir} --num 16\n"
        + (
            f"            deepspeed engine/launch.py --stage finetune --init {run_dir}   # stage 2\n"
            if stage_1
            else ""
        )
        + (
            f"            deepspeed engine/launch.py --stage {args.stage} --resume auto {' '.join(again)} "
            f"train.steps={2 * config.train.steps}   # train on\n"
            if config.optim.schedule != "cosine"
            else ""
        ),
        end="",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(start_peers=True))
