"""The console command `iomm`: index, cache, sample, edit, evaluate, export, report, doctor."""

import argparse
import sys
from pathlib import Path

from iomm.config import InputError


def main(argv=None):
    """Exit code: 0 done, 1 a folder that `evaluate` looked at is not complete, 2 something that the user gave is wrong (one
    line on stderr).
    """
    parser = argparse.ArgumentParser(
        prog="iomm",
        description="Beside training, which is started with: deepspeed engine/launch.py",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "index", help="read every sample of tar shards once, write an index of the good ones"
    )
    command.add_argument("shards", nargs="+", help="tars, globs in quotes, or folders")
    command.add_argument("--out", required=True, help="folder of the index")
    command.add_argument(
        "--verify",
        choices=("full", "fast"),
        default="full",
        help="full: decode every image; fast: read headers only, no checksums",
    )
    command.add_argument("--captions", choices=("optional", "required"), default="optional")
    command.add_argument("--min-size", type=int, default=32, help="shorter edge in pixels")
    command.add_argument(
        "--max-aspect", type=float, default=10.0, help="longer edge / shorter edge"
    )
    command.add_argument("--max-pixels", type=int, default=1 << 26)
    command.add_argument("--workers", type=int, help="processes; default: one a core")

    command = commands.add_parser(
        "cache", help="write the VAE latents that a run with data.latents reads instead of pixels"
    )
    command.add_argument(
        "--config",
        default="demo",
        help="that run's config: its data, model.vae and data.size_px count",
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.add_argument(
        "--out", required=True, help="folder of the latents; what is already there stays"
    )
    command.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    command.add_argument("--batch", type=int, default=32, help="images encoded at once")
    command.add_argument(
        "--rank",
        type=int,
        help="this process among --ranks; default: $RANK and $WORLD_SIZE, as torchrun",
    )
    command.add_argument("--ranks", type=int)

    def of_a_run(name, text):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--run",
            required=True,
            help="folder of a run, whose newest intact checkpoint is read, or an exported one",
        )
        command.add_argument("--weights", choices=("ema", "raw"), default="ema")
        command.add_argument("--out", help="where to write; default: inside the run's folder")
        return command

    def drawing(command, guidance):
        command.add_argument("--steps", type=int, default=20, help="Euler steps")
        command.add_argument("--seed", type=whole, default=0)
        command.add_argument(
            "--guidance",
            type=float,
            default=guidance,
            help="classifier-free guidance; above 1 after stage 2",
        )
        command.add_argument(
            "--shift",
            type=lambda text: text if text == "flux" else float(text),
            default=1.0,
            help="resolution shift of the steps, above 1 towards noise; flux: FLUX's, by the size",
        )
        command.add_argument(
            "--size",
            metavar="PX",
            help="side of a picture, or WIDTHxHEIGHT; default: the run's data.size_px",
        )

    command = of_a_run(
        "sample", "draw a PNG grid: masked images and what is drawn of them, or prompts"
    )
    drawing(command, 1.0)
    command.add_argument("--num", type=int, default=16)
    command.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="draw from text instead of masked images; repeatable",
    )

    command = of_a_run("edit", "draw an image anew by an instruction")
    drawing(command, 1.0)
    command.add_argument("--image", required=True)
    command.add_argument("--instruction", required=True)

    command = commands.add_parser(
        "evaluate", help="draw or check the picture folder that a benchmark's official grader wants"
    )
    command.add_argument("bench", choices=("geneval", "dpg", "wise", "imgedit", "gedit"))
    command.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE",
        help="geneval: evaluation_metadata.jsonl, and a second one with rewritten prompts; dpg: "
        "its folder of prompts, or dpg_bench.csv; wise: its json files of one protocol; imgedit: "
        "basic_edit.json; gedit: the lines of one language, exported as in engine/README.md",
    )
    command.add_argument("--out", help="the folder; intact pictures of the same settings stay")
    command.add_argument(
        "--graded",
        nargs="+",
        metavar="FILE",
        help="print the scores in the grader's result files beside the paper's; needs no --run",
    )
    command.add_argument(
        "--model", help="with --graded: the paper's model, as iomm-b-512; default: all of them"
    )
    command.add_argument("--run", help="folder of a run, or an exported one")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema")
    command.add_argument(
        "--check", action="store_true", help="look at the folder alone and draw nothing"
    )
    command.add_argument("--origin-img-root", help="imgedit: folder of the pictures to edit")
    command.add_argument("--num", type=int, help="geneval: pictures a prompt; default 4")
    drawing(command, 4.0)
    command.add_argument("--batch", type=int, default=16, help="images drawn at once")
    command.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile, for a GPU: minutes to start, then faster",
    )
    command.add_argument(
        "--rank",
        type=int,
        help="this process among --ranks; default: $RANK and $WORLD_SIZE, as torchrun",
    )
    command.add_argument("--ranks", type=int)

    of_a_run("export", "write generator (diffusers folder), adapter and connector (safetensors)")
    command = commands.add_parser(
        "report", help="write a page of curves, pictures, times and settings: one run or several"
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not")
    command.add_argument(
        "--out",
        help="the HTML file; default: RUN/report.html, or report.html beside the first of several",
    )
    commands.add_parser(
        "doctor", help="what is installed, what is missing, why, and what that costs"
    )
    args = parser.parse_args(argv)
    try:
        return {
            "index": index,
            "cache": cache,
            "sample": sample,
            "edit": edit,
            "evaluate": evaluate,
            "export": export,
            "report": report,
            "doctor": doctor,
        }[args.command](args)
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2


def whole(text):
    """A number that draws can start from; argparse says what was wrong."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def index(args):
    from iomm.engine.data.index import build, summary
    from iomm.engine.data.validate import Rules

    rules = Rules(
        verify=args.verify,
        captions=args.captions,
        min_size_px=args.min_size,
        max_aspect=args.max_aspect,
        max_pixels=args.max_pixels,
    )
    try:
        print(summary(build(args.shards, Path(args.out), rules=rules, workers=args.workers)))
    except KeyboardInterrupt:
        print("iomm: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def cache(args):
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


def sample(args):
    from iomm.engine.evaluation.sample import draw_run

    print(
        draw_run(
            args.run, num=args.num, prompts=args.prompt, singles=True, **drawing_settings(args)
        )
    )
    return 0


def edit(args):
    from iomm.engine.evaluation.sample import edit_run

    print(edit_run(args.run, args.image, args.instruction, **drawing_settings(args)))
    return 0


def evaluate(args):
    if args.graded:
        from iomm.engine.evaluation.graded import compare

        if args.run or args.check or args.out:
            raise InputError("--graded reads result files alone: give no --run, --out or --check")
        print(compare(args.bench, args.graded, model=args.model, prompts=args.prompts))
        return 0
    if args.model or not args.prompts or not args.out:
        raise InputError(
            "evaluate needs --prompts and --out, or --graded with a grader's result files; "
            "--model belongs to --graded"
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
    )


def export(args):
    from iomm.engine.evaluation.sample import export_run

    print(export_run(args.run, weights=args.weights, out=args.out))
    return 0


def drawing_settings(args):
    import torch

    from iomm.engine.evaluation.sample import parse_size

    return dict(
        steps=args.steps,
        seed=args.seed,
        guidance=args.guidance,
        shift=args.shift,
        weights=args.weights,
        out=args.out,
        size=parse_size(args.size) if args.size else None,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def report(args):
    from iomm.engine.observe.report import write

    print(write(args.runs, args.out))
    return 0


def doctor(args):
    from iomm.engine.observe.doctor import print_report

    print_report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
