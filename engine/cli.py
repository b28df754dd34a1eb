"""The console command `iomm`: index, sample, doctor."""

import argparse
import sys
from pathlib import Path

from iomm.config import InputError


def main(argv=None):
    """Exit code: 0 done, 2 something that the user gave is wrong (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="iomm", description="Beside training, which is started with: deepspeed engine/launch.py")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("index", help="read every sample of tar shards once, write an index of the good ones")
    command.add_argument("shards", nargs="+", help="tars, globs in quotes, or folders")
    command.add_argument("--out", required=True, help="folder of the index")

    command = commands.add_parser("sample", help="draw a PNG grid from a run's newest checkpoint")
    command.add_argument("--run", required=True, help="folder of the run")
    command.add_argument("--num", type=int, default=16)
    command.add_argument("--steps", type=int, default=20, help="Euler steps")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--prompt", action="append", default=[], help="draw from text instead of masked images; repeatable")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema")
    command.add_argument("--out", help="PNG file; default: the run's samples/ folder")

    commands.add_parser("doctor", help="what is installed, what is missing, why, and what that costs")
    args = parser.parse_args(argv)
    try:
        return {"index": index, "sample": sample, "doctor": doctor}[args.command](args)
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2


def index(args):
    from iomm.engine.data.index import build, summary
    print(summary(build(args.shards, Path(args.out))))
    return 0


def sample(args):
    import torch

    from iomm.engine.draw import draw_run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(draw_run(args.run, num=args.num, steps=args.steps, seed=args.seed, prompts=args.prompt, weights=args.weights,
                   device=device, out=args.out))
    return 0


def doctor(args):
    from iomm.engine.doctor import print_report
    print_report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
