"""Start or resume a training run.

deepspeed engine/launch.py --stage pretrain [--config NAME] [--resume auto] [KEY=VALUE ...]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":

    def interrupted(*_: object) -> None:
        """End on Ctrl-C during the imports, which take seconds, without their traceback."""
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\niomm: interrupted before the start. Start it again\n")
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

if __name__ == "__main__" and "RANK" in os.environ:
    # Before torch is imported, which takes seconds: the launcher may have died by then.
    os.environ["IOMM_PARENT"] = str(os.getppid())
from iomm.checkout import enter

enter(__file__)

from iomm.engine.parallel import cpu_ranks

if __name__ == "__main__":
    cpu_ranks.die_with_rank_0()

import argparse
import ctypes
import logging
import platform
import shlex
import socket
import textwrap
from typing import TYPE_CHECKING

import torch

from iomm.config import InputError, choice
from iomm.engine import arguments, builders, dry_run, loop
from iomm.engine import state as run_state
from iomm.engine.config import CONFIGS, differences, flat, load_config
from iomm.engine.config_parser import given_once, layered
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

if TYPE_CHECKING:
    from iomm.engine.config import RunConfig
    from iomm.engine.data.source import ImageSource
    from iomm.engine.parallel.ranks import Ranks
    from iomm.model import IOMM

# Options of malloc.h, as (number, value): never map a large block separately, give memory back to
# the system only above 2 GiB of free heap, and grow the heap by 256 MiB.
M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = (-4, 0), (-1, 2**31 - 1), (-2, 2**28)
# Stages and their default configs.
STAGES = {"pretrain": "demo", "finetune": "demo-finetune"}

logger = logging.getLogger("iomm")


def main(argv: list[str] | None = None, start_peers: bool = False) -> int:
    """Run the command and return its exit code.

    0: done. 2: something that the user gave is wrong; rank 0, or the rank concerned with its name,
    prints one line to stderr. 75: stopped by SIGTERM, SIGUSR1 or Ctrl-C and saved, start again with
    --resume auto. 130: Ctrl-C before training, or a second one. The watchdog ends the process with
    70 when a rank or the launcher died, and with 71 after a hang.

    start_peers: this process may start the other ranks of train.cpu_ranks with its own command
    line.
    """
    rank, args = 0, None
    # One rank per machine until the ranks have joined; then the watchdog decides.
    reports_errors = "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0"))
    try:
        group.check_variables()
        rank = int(os.environ.get("RANK", 0))
        args = parse_args(argv)
        check_args(args)
        overrides = list(args.overrides)
        if args.init:
            overrides = given_once([*overrides, f"run.init={args.init}"])
        config = load_config(args.config or STAGES[args.stage], overrides)
        config = builders.with_generator_shape(builders.resolved(config))
        check_run_dir(Path(config.run.dir))
        if args.stage == "finetune" and config.run.init is None:
            raise InputError(
                "--stage finetune needs the weights of a stage-1 run: give --init RUN, the run.dir "
                "of that run"
            )
        _, device = group.take_device(args.local_rank)
        check_kernels(config.precision)
        check_kernels(config.model.mllm_precision, "model.mllm_precision")
        if config.log.wandb:
            check_wandb()
        if args.dry_run is not None:
            if rank == 0:
                print(dry_run.describe(dry_run.make_plan(config, args.dry_run), config))
            return 0
        size = cpu_ranks.num_ranks(config.train, device.type) if start_peers else 1
        with (
            cpu_ranks.Peers(size, cpu_ranks.num_threads(config.train, size)),
            RankLog(config.run.dir),
        ):
            ranks = group.start(config.train.timeout_s, args.local_rank)
            parent = int(os.environ.get("IOMM_PARENT", 0))
            guard = config.guard
            with Watchdog(ranks, config.run.dir, guard.hang_s, guard.lost_s, parent) as watchdog:
                # From here on the watchdog reports errors.
                reports_errors = False
                try:
                    return 0 if run(config, args, ranks, watchdog) else REQUEUE
                except OSError as error:
                    raise InputError(arguments.sentence(error)) from error
    except (InputError, OSError) as error:
        if reports_errors:
            who = f"rank {rank} ({socket.gethostname()}): " if rank else ""
            text = arguments.sentence(error) if isinstance(error, OSError) else error
            print(f"iomm: {who}{text}", file=sys.stderr, flush=True)
        if os.environ.get("IOMM_TRACEBACK"):
            raise
        return REFUSED
    except KeyboardInterrupt:
        if rank == 0:
            again = f"Continue with: {command(args)}" if args else "Start it again"
            print(f"iomm: interrupted without saving. {again}", file=sys.stderr, flush=True)
        return 130
    finally:
        group.stop()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line; `overrides` holds the section.key=value words."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", default="pretrain", help=f"one of: {', '.join(STAGES)}")
    parser.add_argument(
        "--config",
        type=arguments.path,
        help="name of a file in engine/configs, or a path ending in .yaml; default: the stage's "
        "demo",
    )
    parser.add_argument(
        "--init",
        type=arguments.path,
        help="run folder whose newest weights (run.init_weights) this run starts from",
    )
    parser.add_argument(
        "--resume",
        type=arguments.path,
        default="none",
        help="none, auto (newest intact checkpoint of run.dir, if any), or a checkpoint folder",
    )
    parser.add_argument(
        "--profile",
        default="none",
        help="none, nsys or torch: trace profile.num_steps steps from profile.start_step on",
    )
    parser.add_argument(
        "--hook",
        type=arguments.path,
        metavar="package.module:function",
        help="called on rank 0 after each evaluation with (config, step, images, prompts); the "
        "{name: number} that it returns is logged",
    )
    parser.add_argument(
        "--dry-run",
        type=arguments.whole(1),
        nargs="?",
        const=8,
        metavar="GPUS",
        help="check config and paths, print parameters, memory and work for this number of GPUs "
        "(default 8), and stop",
    )
    # DeepSpeed's launcher adds it.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for options whose values are wrong whatever the config holds."""
    choice("--stage", args.stage, tuple(STAGES))
    choice("--profile", args.profile, ("none", "nsys", "torch"))


def check_run_dir(run_dir: Path) -> None:
    """Check that a new run does not fill the current folder or one above it.

    A value such as "$RUNS/" or "./$NAME" means these when the shell variable is not set.

    Raises:
        InputError: it would, and no run is there yet.
    """
    if run_dir not in (Path.cwd(), *Path.cwd().parents, Path("/")):
        return
    if not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"run.dir is {run_dir}, which is the current folder or one above it. Give the run a "
            "separate folder such as runs/NAME; a shell variable may be unset"
        )


def check_kernels(precision: str, key: str = "precision") -> None:
    """Check that this machine can run the backends in IOMM_KERNELS, and fp8 if `key` requests it.

    Raises:
        InputError: IOMM_KERNELS names an unknown backend or one that cannot run here, or the
            GPU has no fp8.
    """
    if precision == "fp8" and (reason := fp8_linear.why_not()):
        raise InputError(
            f"{key} fp8 on this GPU ({torch.cuda.get_device_name()}) {reason}: set "
            f"{key}={'bf16' if key == 'precision' else 'auto'}"
        )
    try:
        dispatch.table("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise InputError(str(error)) from error


def run(config: RunConfig, args: argparse.Namespace, ranks: Ranks, watchdog: Watchdog) -> bool:
    """Build all parts of the run and train. Return False if a signal stopped it before the end."""
    prepare_process(config, ranks)
    config, why = dry_run.with_micro_batch(config, ranks)
    hook = load_hook(args.hook) if args.hook else None
    ranks.on_first(lambda: open_run_dir(config, args))
    if why is not None and ranks.first:
        logger.info(why)
    folder = choose_checkpoint(config, args, ranks)
    state, source, flops = build(config, ranks, folder)
    # Only now are the data known to be the run's.
    ranks.on_first(lambda: write_config(config))
    if args.resume not in ("none", "auto"):
        # The given checkpoint may be an earlier one of this run: set later ones aside.
        ranks.on_first(
            lambda: checkpoint_writer.set_aside(Path(config.run.dir) / "checkpoints", state.step)
        )
    metrics = None
    if ranks.first:
        metrics = Metrics(
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
        metrics.attempt("machine.json", write_machine, config.run.dir, ranks.size)
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
    if not loop.train(state, source, config, saver, watchdog, metrics, window, evaluation):
        logger.info(
            f"stopped by a signal; step {state.step} is saved. Continue with: {command(args)}"
        )
        return False
    if ranks.device.type == "cpu":
        # The other ranks of this machine are idle while rank 0 finishes.
        torch.set_num_threads(cpu_ranks.num_threads(config.train, 1))
    ranks.on_first(lambda: finish(config, args, metrics, saver, ranks))
    return True


def prepare_process(config: RunConfig, ranks: Ranks) -> None:
    """Set this rank's number of threads, and on a CPU with glibc keep freed memory.

    glibc returns every large tensor to the system and gets it back page by page, which takes a
    tenth of a step of demo-cpu.
    """
    torch.set_num_threads(cpu_ranks.num_threads(config.train, ranks.local_size))
    if ranks.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        for option, value in M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD:
            ctypes.CDLL(None).mallopt(option, value)


def build(
    config: RunConfig, ranks: Ranks, folder: Path | str | None = None
) -> tuple[run_state.State, ImageSource, float]:
    """Build data, frozen parts, trained parts and optimizer. Called by all ranks together.

    Args:
        config: the run's config.
        ranks: this process and the others.
        folder: checkpoint to restore. None: the weights of run.init if that is set, else
            fresh ones.

    Returns:
        The state, the source of its batches, and the FLOPs that one image needs.
    """
    adamw = zero.adamw_backend(config.optim.adamw, ranks.device)
    config.zero.check_ranks(ranks.size)
    index_dir = pairs_dir = None
    if config.train.data != "pair":
        index_dir = ranks.on_first(lambda: builders.prepare_data(config))
    if config.train.data != "image":
        pairs_dir = ranks.on_first(lambda: builders.prepare_data(config, pairs=True))
    for sentence in builders.foreign_data(config):
        logger.warning(sentence)
    ranks.on_first(lambda: builders.report_upscaling(config, index_dir, pairs_dir))
    shards = builders.base_shards(config, ranks)
    model = builders.build_model(config, ranks.device, ranks, shards=shards)
    mllm, vae = model.frozen
    if pairs_dir is not None:
        for sentence in ranks.on_first(lambda: builders.long_captions(config, pairs_dir, mllm)):
            logger.warning(sentence)
    source = builders.open_source(
        config, ranks, mllm, vae, index_dir=index_dir, pairs_dir=pairs_dir
    )
    if ranks.first:
        logger.info(describe_start(config, ranks, model, source))
    if config.run.init is not None and folder is None and not config.lora.rank:
        logger.info(start_from(config, model, ranks))
    if config.precision == "fp8":
        logger.warning(
            "warning: precision fp8 has not been compared on a GPU yet, so its loss may differ "
            "from bf16's (python benchmarks/studies/precision.py compares them)"
        )
    flops = sum(dry_run.work(model, config).values())
    base = builders.base_facts(config, model, shards)
    compiled = config.train.compiled(ranks.device)
    if compiled:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        # The exchange also keeps all ranks from compiling before the cache is clean.
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
    bad_samples = BadSamples(
        config.data.max_bad_fraction,
        config.data.max_bad_shards,
        Path(config.run.dir) / "skipped.jsonl" if ranks.first else None,
    )
    guard = config.guard
    state = run_state.State(
        sharded,
        Ema(sharded.masters, config.ema.decay),
        LossGuard(guard.max_skips, guard.spike_sigmas, guard.skip_spikes),
        bad_samples,
        ranks,
        ranks.on_first(lambda: builders.data_facts(source.shards)),
        base,
    )
    if folder is not None:
        run_state.restore(state, folder)
        logger.info(f"resumed from {folder}: step {state.step} of {config.train.steps}")
    source.start_step = state.step
    return state, source, flops


def describe_start(config: RunConfig, ranks: Ranks, model: IOMM, source: ImageSource) -> str:
    """Return the lines that rank 0 logs before training."""
    threads, steps = torch.get_num_threads(), source.accumulation_steps
    trained, frozen = dry_run.size(model), dry_run.frozen_size(model)
    what = "trained (LoRA)" if config.lora.rank else "trained"
    memory = dry_run.memory(model, config, ranks.size, source.micro_batch, ranks.device.type)
    return "\n".join(
        [
            f"data        {len(source.shards):,} samples, {config.data.size_px} px",
            f"devices     {count(ranks.size, 'rank')} on {ranks.device.type}, "
            f"{count(threads, 'thread')} each",
            f"training    {config.train.steps:,} steps of {config.train.global_batch:,} samples, "
            f"{source.micro_batch} per rank, {count(steps, 'accumulation step')}",
            f"model       {trained / 1e6:.1f} M {what} and {frozen / 1e6:.1f} M frozen "
            f"parameters, {config.precision}, ZeRO stage {config.zero.stage}",
            "kernels     op, device, backend in use; other backends with the reason",
            textwrap.indent(dispatch.format_table(ranks.device.type), "  "),
            *dry_run.memory_table(memory),
        ]
    )


def count(number: int, noun: str) -> str:
    """Return "1 rank", "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def start_from(config: RunConfig, model: IOMM, ranks: Ranks) -> str:
    """Load the weights of run.init into the model and describe them in a line.

    Called by all ranks together.
    """
    foreign = builders.diffusers_folder(config.run.init)
    if foreign is not None:
        return builders.load_foreign_weights(model, foreign)
    _, folder = builders.read_run(config.run.init, ranks)
    averaged = builders.load_weights(model, folder, config.run.init_weights)["ema"]
    weights = config.run.init_weights if averaged else "raw"
    return f"initialized with the {weights} weights of {folder}"


def open_run_dir(config: RunConfig, args: argparse.Namespace) -> None:
    """Check that run.dir is new or belongs to this config, create it and lock it, on rank 0.

    Raises:
        InputError: it belongs to another config, holds a run that is not to be resumed, is in use,
            or cannot be written.
    """
    run_dir = Path(config.run.dir)
    if (run_dir / "config.yaml").is_file():
        changed = differences(config, builders.saved_config(run_dir))
        if changed:
            raise InputError(
                f"{run_dir} belongs to a run with another config ({'; '.join(changed)}). Resume it "
                "with the same values, or continue in a new run.dir with --resume "
                f"{shlex.quote(f'{run_dir}/checkpoints/step-N')}"
            )
    if args.resume == "none" and checkpoint_reader.steps(run_dir / "checkpoints"):
        raise InputError(
            f"{run_dir} already contains a run. Add --resume auto to continue it, or choose "
            "another run.dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint_writer.lock_run_dir(run_dir)
        if config.cache.dir is not None:
            builders.cache_dir(config)
    except OSError as error:
        raise InputError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error


def choose_checkpoint(
    config: RunConfig, args: argparse.Namespace, ranks: Ranks
) -> Path | str | None:
    """Return the checkpoint to resume from, or None. All ranks verify it together.

    Raises:
        InputError: the checkpoint of --resume is damaged, or run.dir has only damaged ones.
    """
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
                f"all checkpoints in {checkpoints} are damaged. Choose another run.dir to start "
                "from scratch"
            )
        logger.info(f"no checkpoint in {checkpoints} yet: starting at step 0")
    return folder


def write_config(config: RunConfig) -> None:
    """Write run.dir/config.yaml with every key. Raises InputError where it cannot be written."""
    path = Path(config.run.dir) / "config.yaml"
    try:
        with whole_file(path) as partial:
            partial.write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def finish(
    config: RunConfig,
    args: argparse.Namespace,
    metrics: Metrics,
    saver: checkpoint_writer.Saver,
    ranks: Ranks,
) -> None:
    """Sample a grid from the last checkpoint, write the report and print the summary.

    Called on rank 0. On the shapes dataset samples are scored as well. Whatever fails here, the
    run is complete.
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
    # Of any kind: too little memory, a full disk, ...
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        print(f"samples     failed, training is complete: {type(error).__name__}: {message}")
    if report := metrics.report():
        print(f"report      {report}")
    metrics.close()
    if saver.folder is not None:
        print(
            f"checkpoint  {saver.folder}, {saver.bytes / 2**20:.0f} MiB, written in "
            f"{saver.write_s:.1f} s; training waited {saver.stall_s:.2f} s for it"
        )
        print(f"            {advice(config, metrics, saver, ranks.size)}")
    print(f"log         {run_dir}/log.jsonl; tensorboard --logdir {shlex.quote(f'{run_dir}/tb')}")
    print(f"{metrics.hours:<12}{metrics.gpu_hours:.3f}")
    print("\n".join(next_commands(config, args)), flush=True)


def command(args: argparse.Namespace, *changes: str, resume: str = "auto") -> str:
    """Return this command with other settings, quoted for a shell, as the user started it.

    changes: "section.key=value" words.
    """
    given = {"stage": args.stage, "config": args.config, "init": args.init, "hook": args.hook}
    options = [f"--{name}={value}" for name, value in given.items() if value]
    overrides = layered([*args.overrides, *changes])
    start = arguments.start_of_command("iomm.engine.launch")
    return shlex.join([*start, *options, "--resume", resume, *overrides])


def next_commands(config: RunConfig, args: argparse.Namespace) -> list[str]:
    """Return the lines of the summary with the commands to run next."""
    run_dir = config.run.dir
    commands = [shlex.join(["iomm", "sample", "--run", run_dir, "--num", "16"])]
    if args.stage == "pretrain":
        words = arguments.start_of_command("iomm.engine.launch")
        words += ["--stage", "finetune", "--init", run_dir]
        if (CONFIGS / f"{args.config}-finetune.yaml").is_file():
            words += ["--config", f"{args.config}-finetune"]
        commands.append(f"{shlex.join(words)}   # stage 2")
    # With a cosine schedule the number of steps shapes all steps, so that more cannot be added.
    if config.optim.schedule != "cosine":
        again = command(args, f"train.steps={2 * config.train.steps}")
        commands.append(f"{again}   # train for twice as many steps")
    labels = ["next", *[""] * (len(commands) - 1)]
    return [f"{label:<12}{line}" for label, line in zip(labels, commands, strict=True)]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(start_peers=True))
