"""The console command `iomm`: index, cache, sample, edit, evaluate, export, report, doctor."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from iomm import __version__
from iomm.config import InputError
from iomm.engine import arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done. 1: a folder that `evaluate` checked is incomplete. 2: something that the user gave is
    wrong. 130: Ctrl-C. 141: the output was a pipe, and its reader has ended. One line on stderr
    has the reason.
    """
    parser = arguments.Parser(
        prog="iomm",
        description="Tools around training, which starts with: deepspeed engine/launch.py",
    )
    parser.add_argument("--version", action="version", version=f"iomm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "index", help="validate every sample of tar shards and write an index of the good ones"
    )
    command.add_argument(
        "shards", nargs="+", type=arguments.path, help="tars, globs in quotes, or folders"
    )
    command.add_argument("--out", type=arguments.path, required=True, help="folder of the index")
    command.add_argument(
        "--verify",
        choices=("full", "fast"),
        default="full",
        help="full: decode every image; fast: read only headers, without checksums",
    )
    command.add_argument("--captions", choices=("optional", "required"), default="optional")
    command.add_argument(
        "--min-size", type=arguments.whole(1), default=32, help="shorter edge in pixels"
    )
    command.add_argument(
        "--max-aspect", type=arguments.number(1), default=10.0, help="longer edge / shorter edge"
    )
    command.add_argument("--max-pixels", type=arguments.whole(1), default=1 << 26)
    command.add_argument(
        "--workers", type=arguments.whole(1), help="processes; default: one per core"
    )
    command.add_argument(
        "--config",
        type=arguments.path,
        default="demo-finetune",
        help="with --captions required: config of the run that will read the pairs; captions that "
        "exceed the context of its MLLM are counted",
    )

    command = commands.add_parser(
        "cache", help="write VAE latents, which a run with data.latents reads instead of pixels"
    )
    command.add_argument(
        "--config",
        type=arguments.path,
        default="demo",
        help="config of that run; its data, model.vae and data.size_px are used",
    )
    arguments.add_overrides(command)
    command.add_argument(
        "--out",
        type=arguments.path,
        required=True,
        help="folder of the latents; existing files are kept",
    )
    command.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    command.add_argument(
        "--batch", type=arguments.whole(1), default=32, help="images encoded at once"
    )
    command.add_argument(
        "--rank",
        type=arguments.whole(0),
        help="this process among --ranks; default: $RANK and $WORLD_SIZE, as torchrun",
    )
    command.add_argument("--ranks", type=arguments.whole(1))

    def add_frozen(command: argparse.ArgumentParser) -> None:
        for part, meaning in (("mllm", "MLLM"), ("vae", "VAE")):
            command.add_argument(
                f"--{part}",
                type=arguments.path,
                help=f"folder or hub id of the {meaning}; default: the one that the run names",
            )

    def add_run_command(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--run",
            type=arguments.path,
            required=True,
            help="run folder, whose newest intact checkpoint is read, or an exported folder",
        )
        command.add_argument("--weights", choices=("ema", "raw"), default="ema")
        command.add_argument(
            "--out", type=arguments.path, help="where to write; default: inside the run folder"
        )
        add_frozen(command)
        return command

    def add_sampling(command: argparse.ArgumentParser, guidance: float) -> None:
        command.add_argument("--steps", type=arguments.whole(1), default=20, help="Euler steps")
        command.add_argument("--seed", type=arguments.seed, default=0)
        command.add_argument(
            "--guidance",
            type=arguments.number(0),
            default=guidance,
            help="scale of classifier-free guidance; above 1 needs a stage-2 run",
        )
        command.add_argument(
            "--shift",
            type=arguments.shift,
            default=1.0,
            help="resolution shift of the time steps, above 1 towards noise; flux or qwen-image: "
            "the steps of that model for the image size",
        )
        command.add_argument(
            "--size",
            type=arguments.path,
            metavar="PX",
            help="side of an image in pixels, or WIDTHxHEIGHT; default: the run's data.size_px",
        )

    command = add_run_command(
        "sample", "generate a PNG grid from masked images of the dataset, or from prompts"
    )
    add_sampling(command, 1.0)
    command.add_argument(
        "--num", type=arguments.whole(1), help="images; default 16, or one per prompt"
    )
    command.add_argument(
        "--prompt",
        action="append",
        type=arguments.text_of_shell,
        default=[],
        help="generate from this text instead of masked images; may be repeated",
    )

    command = add_run_command("edit", "edit an image by an instruction")
    add_sampling(command, 1.0)
    command.add_argument("--image", type=arguments.path, required=True)
    command.add_argument("--instruction", type=arguments.text_of_shell, required=True)

    command = commands.add_parser(
        "evaluate", help="generate or check the images that a benchmark's official grader reads"
    )
    command.add_argument("bench", choices=("geneval", "dpg", "wise", "imgedit", "gedit"))
    command.add_argument(
        "--prompts",
        nargs="+",
        type=arguments.path,
        metavar="FILE",
        help="geneval: evaluation_metadata.jsonl, optionally followed by a file with rewritten "
        "prompts; dpg: its folder of prompts, or dpg_bench.csv; wise: the JSON files of one "
        "protocol; imgedit: basic_edit.json; gedit: one language, exported as in engine/README.md",
    )
    command.add_argument(
        "--out",
        type=arguments.path,
        help="the folder; intact images with the same settings are kept",
    )
    command.add_argument(
        "--graded",
        nargs="+",
        type=arguments.path,
        metavar="FILE",
        help="compare the scores in the grader's result files with the paper's; needs no --run",
    )
    command.add_argument(
        "--model",
        type=arguments.path,
        help="with --graded: a model of the paper, such as iomm-b-512; default: all",
    )
    command.add_argument("--run", type=arguments.path, help="run folder, or an exported folder")
    add_frozen(command)
    command.add_argument("--weights", choices=("ema", "raw"), default="ema")
    command.add_argument(
        "--check", action="store_true", help="only check the folder, generate nothing"
    )
    command.add_argument(
        "--origin-img-root", type=arguments.path, help="imgedit: folder of the images to edit"
    )
    command.add_argument(
        "--num", type=arguments.whole(1), help="geneval: images per prompt; default 4"
    )
    add_sampling(command, 4.0)
    command.add_argument(
        "--batch", type=arguments.whole(1), default=16, help="images generated at once"
    )
    command.add_argument(
        "--compile",
        action="store_true",
        help="use torch.compile; on a GPU: takes minutes to start and is faster afterwards",
    )
    command.add_argument(
        "--rank",
        type=arguments.whole(0),
        help="this process among --ranks; default: $RANK and $WORLD_SIZE, as torchrun",
    )
    command.add_argument("--ranks", type=arguments.whole(1))

    command = add_run_command(
        "export",
        "write generator (diffusers folder), adapter and connector (safetensors), or the LoRA of a "
        "run that trained one",
    )
    command.add_argument(
        "--merge",
        action="store_true",
        help="merge the LoRA into its base and write the whole model",
    )
    command = commands.add_parser(
        "report", help="write a page with curves, samples, times and settings of one run or several"
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=arguments.path,
        metavar="RUN",
        help="run folder; the run may be unfinished",
    )
    command.add_argument(
        "--out",
        type=arguments.path,
        help="the HTML file; default: RUN/report.html, or report.html next to the first of several",
    )
    commands.add_parser(
        "doctor", help="list what is installed and what is missing, why, and what that costs"
    )
    args = None
    try:
        args = parser.parse_args(argv)
        code = {
            "index": index,
            "cache": cache,
            "sample": sample,
            "edit": edit,
            "evaluate": evaluate,
            "export": export,
            "report": report,
            "doctor": doctor,
        }[args.command](args)
        # Here and not when Python exits, where an error could not be caught.
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = args is not None and args.command in ("index", "cache", "evaluate")
        rest = "the same command continues from here" if resumes else "nothing was written"
        print(f"iomm: interrupted; {rest}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still in the buffer would fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("iomm: the program that reads the output has ended", file=sys.stderr)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if os.environ.get("IOMM_TRACEBACK"):
            raise
        print(f"iomm: {arguments.sentence(error)}", file=sys.stderr)
        return 2


def index(args: argparse.Namespace) -> int:
    from iomm.engine.data.index import build, summary
    from iomm.engine.data.validate import Rules

    rules = Rules(
        verify=args.verify,
        captions=args.captions,
        min_size_px=args.min_size,
        max_aspect=args.max_aspect,
        max_pixels=args.max_pixels,
    )
    config = None
    if args.captions == "required":
        from iomm.engine.config import load_config

        config = load_config(args.config)
    folder = build(args.shards, Path(args.out), rules=rules, workers=args.workers)
    print(summary(folder))
    if config is not None:
        from iomm.engine.builders import long_captions

        for sentence in long_captions(config, folder):
            print(sentence)
    return 0


def cache(args: argparse.Namespace) -> int:
    from iomm.engine.builders import write_latents
    from iomm.engine.config import load_config

    print(
        write_latents(
            load_config(args.config, args.overrides),
            args.out,
            dtype=args.dtype,
            batch=args.batch,
            rank=args.rank,
            num_ranks=args.ranks,
        )
    )
    return 0


def sample(args: argparse.Namespace) -> int:
    from iomm.engine.evaluation.sample import sample_run

    print(
        sample_run(
            args.run,
            num=args.num or max(16, len(args.prompt)),
            prompts=args.prompt,
            singles=True,
            **sampling_settings(args),
        )
    )
    return 0


def edit(args: argparse.Namespace) -> int:
    from iomm.engine.evaluation.sample import edit_run

    print(edit_run(args.run, args.image, args.instruction, **sampling_settings(args)))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    if args.graded:
        from iomm.engine.evaluation.graded import compare

        if args.run or args.check or args.out:
            raise InputError("--graded only reads result files. Remove --run, --out and --check.")
        print(compare(args.bench, args.graded, model=args.model, prompts=args.prompts))
        return 0
    if args.model:
        raise InputError("--model is an option of --graded, which is missing")
    required = {"--prompts": args.prompts, "--out": args.out}
    if missing := [name for name, value in required.items() if not value]:
        raise InputError(
            f"the following arguments are required: {', '.join(missing)}. "
            "To read a grader's result files, give --graded instead."
        )

    from iomm.engine.evaluation.folder import evaluate
    from iomm.engine.evaluation.sample import parse_size

    return evaluate(
        args.bench,
        prompts=args.prompts,
        out=args.out,
        run=args.run,
        root=args.origin_img_root,
        num=args.num,
        size=parse_size(args.size) if args.size else None,
        steps=args.steps,
        seed=args.seed,
        guidance=args.guidance,
        shift=args.shift,
        weights=args.weights,
        batch=args.batch,
        compiled=args.compile,
        rank=args.rank,
        num_ranks=args.ranks,
        check_only=args.check,
        mllm=args.mllm,
        vae=args.vae,
    )


def export(args: argparse.Namespace) -> int:
    from iomm.engine.evaluation.sample import export_run

    print(
        export_run(
            args.run,
            weights=args.weights,
            out=args.out,
            merge=args.merge,
            mllm=args.mllm,
            vae=args.vae,
        )
    )
    return 0


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that sample and edit share."""
    import torch

    from iomm.engine.builders import limit_threads
    from iomm.engine.evaluation.sample import parse_size

    limit_threads()
    return dict(
        steps=args.steps,
        seed=args.seed,
        guidance=args.guidance,
        shift=args.shift,
        weights=args.weights,
        out=args.out,
        mllm=args.mllm,
        vae=args.vae,
        size=parse_size(args.size) if args.size else None,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def report(args: argparse.Namespace) -> int:
    from iomm.engine.observe.report import write

    print(write(args.runs, args.out))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from iomm.engine.observe.doctor import print_report

    print_report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
