"""Images a second from text: python benchmarks/sampling.py --run runs/demo-finetune [--compile]

Writes benchmarks/results/sampling-<device>-<date>.json. Timed is what a user waits for: text in, PIL images out.
"""

import sys

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import statistics
import time

from benchmarks.report import above_0, command
from iomm.pipeline import height_width


def sampling_rate(pipeline, *, steps=20, guidance=4.0, size=None, batches=3, compiled=False):
    """Draws `batches` full batches of prompts that all differ, after one step as a warm-up -> a row: images_per_s, the
    median's; batch_s, seconds of each; generator_tflops, 1e12 FLOP of the generator's products in a second of drawing.
    compiled is only noted: call pipeline.compile() before.
    """
    model, size, num = pipeline.model, height_width(size or pipeline.size_px), pipeline.batch
    mllm, vae = model.frozen
    texts = [f"{i} red circles beside a blue square" for i in range(num)]
    num_condition = model.encode_condition(mllm.condition(texts[:1]))[0].shape[1]
    settings = dict(guidance=guidance, size=size)
    pipeline(texts, steps=1, **settings)
    seconds = []
    for i in range(batches):
        started = time.perf_counter()
        # Ends with pixels on the CPU: nothing is still queued.
        pipeline(texts, steps=steps, seed=i, **settings)
        seconds.append(time.perf_counter() - started)
    rate = num / statistics.median(seconds)
    flops = (
        steps
        * (1 if guidance == 1.0 else 2)
        * model.generator.flops_per_image(vae.grid(*size), num_condition)
    )
    return {
        "images_per_s": rate,
        "batch_s": seconds,
        "batch": num,
        "size_px": size,
        "steps": steps,
        "guidance": guidance,
        "compiled": compiled,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_condition": num_condition,
        "parameters": sum(p.numel() for p in model.generator.parameters()),
        "generator_tflop_per_image": flops / 1e12,
        "generator_tflops": flops * rate / 1e12,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run, or an exported one")
    parser.add_argument("--batch", type=above_0(int), default=16)
    parser.add_argument("--steps", type=above_0(int), default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", help="side in pixels, or WIDTHxHEIGHT; default: the run's")
    parser.add_argument("--batches", type=above_0(int), default=3)
    parser.add_argument("--compile", action="store_true", help="a second row, with torch.compile")
    args = parser.parse_args()
    import torch

    from iomm.engine.evaluation.sample import open_pipeline, parse_size
    from iomm.engine.observe.doctor import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe, _ = open_pipeline(args.run, device=device)
    pipe.batch = args.batch
    settings = dict(
        steps=args.steps,
        guidance=args.guidance,
        size=parse_size(args.size) if args.size else None,
        batches=args.batches,
    )
    rows = [sampling_rate(pipe, **settings)]
    if args.compile:
        rows.append(sampling_rate(pipe.compile(), compiled=True, **settings))
    facts = machine()
    path = ROOT / "benchmarks/results" / f"sampling-{device}-{facts['date']}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(path, *(f"{row['images_per_s']:.3g} images/s" for row in rows))


if __name__ == "__main__":
    sys.exit(command(main))
