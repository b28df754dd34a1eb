"""Measure the training time until a model reaches a given quality, ours against the baseline.

    stage 1 with three seeds, stage 2 after a run, and shorter studies:
    python benchmarks/studies/time_to_quality.py
    python benchmarks/studies/time_to_quality.py --stage finetune run.init=runs/demo
    python benchmarks/studies/time_to_quality.py --seeds 1 --variants baseline,ours train.steps=300
    python benchmarks/studies/time_to_quality.py optim.schedule=constant --seconds 900

    baseline        Algorithm 1 in plain PyTorch (benchmarks/lib/baseline.py), hidden tokens masked
    literal         the baseline with hidden tokens as zeros and all MLLM outputs as condition;
                    stage 1 only
    ours            the engine without the features below: the same function as the baseline
    ours+align      with the alignment loss: align.weight, 0.5 unless the config sets it
    ours+latents    with latents and image tokens encoded before training: data.latents=memory
    ours+cache      with VAE latents on disk, as `iomm cache` writes them; stage 1 only
    ours+draws      with several noise draws for each image: train.noise_draws, 2 unless the config
                    sets more
    everything      with alignment, noise draws, and latents and image tokens encoded before
                    training

A variant ends after train.steps, or after --seconds of training if that comes first. Under a
constant learning rate train.steps is ignored and --seconds is 600 by default.

All variants train in this process, on the shapes dataset, from the same weights, on the same
samples in the same order with the same masks, times and noise, with the same optimizer and learning
rate. They take turns of --slice seconds on the same cores in a rotating order, which spreads the
noise of a shared machine evenly. A variant's time is the sum of its turns. Evaluation is not
counted. Encoding before training is counted once and reported separately.

After every turn the averaged (EMA) weights are evaluated by the same model and function for all
variants. The held-out loss is the velocity loss of held-out samples at fixed times and noise. The
strict score is the share of pictures that match every word of their caption
(engine/shapes/scorer.py), sampled from masked images in stage 1 and from captions in stage 2. The
time at which a variant reaches a quality is interpolated linearly on its best value so far. A ratio
is the first variant's time over another's, taken seed by seed, with the median, lowest and highest
over the seeds.

benchmarks/results/time-to-quality-<config>-<device>-<date>.json, which includes the curves, is
written after every turn, and a PNG next to it after every seed.
"""

import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.ablations import swapped
from benchmarks.lib.baseline import BaselineModel, Trainer, engine_draws
from benchmarks.lib.harness import Bench
from benchmarks.report import baseline_name, command, label, positive, time_to_quality
from benchmarks.studies.recipes import write
from iomm.config import InputError
from iomm.engine import builders, launch
from iomm.engine.arguments import add_overrides
from iomm.engine.config import RunConfig, flat, load_config
from iomm.engine.data.source import Batch, ImageSource
from iomm.engine.evaluation.heldout import Evaluation, fixed, losses_at
from iomm.engine.evaluation.shapes_grades import GUIDANCE, grade, overall
from iomm.engine.observe.doctor import machine
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel.optim import learning_rate
from iomm.engine.shapes import scorer
from iomm.engine.shapes.dataset import KINDS
from iomm.layout import Layout
from iomm.model import IOMM

SCORES = (0.25, 0.5, 0.75, 0.9)
# The default targets are the first variant's losses after these shares of its time.
LOSSES_AT = (0.25, 0.5, 1.0)
HELDOUT = 64
ALIGN_WEIGHT = 0.5
CONSTANT_S = 600.0
# The units in which the crossing of a curve is measured.
CLOCKS = ("s", "cpu_s", "steps")
# DeepSpeed replaces this function in the whole process if blocks are not compiled on a GPU.
LINEAR = torch.nn.functional.linear


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a variant differs from `ours`.

    Attributes:
        baseline: plain PyTorch instead of the engine.
        every: all outputs condition the generator.
        aligned: with the alignment loss.
        drawn: with several noise draws for each image.
        encoded: where the latents are kept, "memory" or "disk"; None for no encoding in advance.
    """

    baseline: bool = False
    every: bool = False
    aligned: bool = False
    drawn: bool = False
    encoded: str | None = None


VARIANTS = {
    "baseline": Variant(baseline=True),
    "literal": Variant(baseline=True, every=True),
    "ours": Variant(),
    "ours+align": Variant(aligned=True),
    "ours+latents": Variant(encoded="memory"),
    "ours+cache": Variant(encoded="disk"),
    "ours+draws": Variant(drawn=True),
    "everything": Variant(aligned=True, drawn=True, encoded="memory"),
}
DEFAULT = ("baseline", "ours", "ours+align", "ours+latents", "everything")


# Training


class Ours(Bench):
    """The engine's own step (benchmarks/lib/harness.py), from the initial weights of the config."""

    def __init__(self, config: RunConfig, ranks: group.Ranks):
        super().__init__(config, ranks, fresh=True)

    def averaged(self) -> dict[str, Tensor]:
        """Return the weights to evaluate: the average, or without one the masters."""
        return self.weights(self.state.ema.flats)


class Baseline:
    """Plain PyTorch with the engine's initial weights, batches and draws."""

    def __init__(self, config: RunConfig, ranks: group.Ranks, every: bool = False):
        if every and config.train.data != "image":
            raise InputError("all outputs as condition are implemented for train.data=image only")
        self.config, self.device, self.steps = config, ranks.device, 0
        model = builders.build_model(config, ranks.device)
        if config.run.init is not None:
            launch.start_from(config, model, ranks)
        self.source = open_source(config, ranks, model)
        self.batches = iter(self.source)
        # The engine's masters start from weights in the run's dtype.
        model.to(ranks.device, config.dtype)
        self.compiled = config.train.compiled(ranks.device)
        model.prepare_blocks(compiled=self.compiled)
        with torch.device(ranks.device):
            self.net = BaselineModel(
                model.generator.config,
                config.adapter,
                *model.frozen,
                ratio=config.mask.ratio,
                every=every,
                autocast=config.precision != "fp32",
            ).to(ranks.device)
        self.net.load(model.state_dict())
        # Our model has no pooled text vector. This embedder gets zeros for it, so only its bias
        # would train, and only on this side.
        self.net.generator.time_text_embed.text_embedder.requires_grad_(False)
        if self.compiled:
            self.net.compile_blocks()
        self.trainer = Trainer(self.net, config.optim, config.ema.decay)
        self.layout = Layout(self.net.shape, self.net.patch)

    def draws(self, batch: Batch) -> tuple:
        """Return the engine's draws and texts for a batch."""
        return engine_draws(self.config, batch, *self.net.frozen)

    def step(self) -> float:
        """Take one optimizer step and return its mean loss."""
        config, num = self.config, self.source.accumulation_steps
        self.trainer.set_lr(learning_rate(self.steps, config.optim, config.train.steps))
        with swapped(torch.nn.functional, linear=LINEAR):
            loss = self.trainer.step(islice(self.batches, num), num, self.draws).item()
        self.steps += 1
        if not math.isfinite(loss):
            raise ValueError(f"the baseline's loss at step {self.steps} is {loss}")
        return loss

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def weights(self, averaged: bool = False) -> dict[str, Tensor]:
        """Return name -> tensor, with the engine's names."""
        theirs = {name: p.detach() for name, p in self.net.named_parameters()}
        if averaged and self.trainer.average:
            names = [name for name, p in self.net.named_parameters() if p.requires_grad]
            theirs |= zip(names, self.trainer.average, strict=True)
        ours = {name: tensor for name, tensor in theirs.items() if name.startswith("adapter.")}
        for name in self.layout.pieces:
            ours[f"generator.{name}"] = self.layout.to_ours(
                name, lambda n: theirs[f"generator.{n}"]
            )
        return ours

    def averaged(self) -> dict[str, Tensor]:
        """Return the weights to evaluate: the average, or without one the parameters."""
        return self.weights(averaged=True)

    def loss(self, batch: Batch) -> float:
        """Return the loss of a batch with the engine's draws."""
        with torch.no_grad(), swapped(torch.nn.functional, linear=LINEAR):
            draws = self.draws(batch)
            return self.net.loss(batch.pixels_BCHW, batch.vit_pixels_BHWC, *draws).item()


def open_source(config: RunConfig, ranks: group.Ranks, model: IOMM) -> ImageSource:
    """Return the batches that launch.build opens for this config, from step 0."""
    index_dir = pairs_dir = None
    if config.train.data != "pair":
        index_dir = builders.prepare_data(config, progress=False)
    if config.train.data != "image":
        pairs_dir = builders.prepare_data(config, progress=False, pairs=True)
    return builders.open_source(
        config, ranks, *model.frozen, index_dir=index_dir, pairs_dir=pairs_dir
    )


def start(variant: Variant, config: RunConfig, ranks: group.Ranks) -> Ours | Baseline:
    """Build the training of a variant."""
    return Baseline(config, ranks, variant.every) if variant.baseline else Ours(config, ranks)


# Evaluation


class Evaluator:
    """Computes held-out loss and strict score of any variant's weights with a single model."""

    def __init__(self, config: RunConfig, ranks: group.Ranks, *, per_kind: int, draw_steps: int):
        """Build the model and load the held-out batches.

        Args:
            config: what the variants train.
            ranks: the joined ranks.
            per_kind: pictures per kind of caption.
            draw_steps: Euler steps of each picture.
        """
        self.config, self.per_kind, self.draw_steps = config, per_kind, draw_steps
        self.model = builders.build_model(config, ranks.device)
        if config.run.init is not None:
            launch.start_from(config, self.model, ranks)
        evaluation = Evaluation(config, open_source(config, ranks, self.model), ranks)
        kind, self.way = ("image", "image") if config.train.data == "image" else ("pair", "text")
        entries = evaluation.heldout[kind]
        # The last batch is padded with copies of the last sample.
        self.num_heldout, self.batches = len(entries), list(evaluation.batches(kind, entries))
        self.model.to(ranks.device, config.dtype)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load a variant's weights without those that only training needs (alignment head)."""
        self.model.load_state_dict({name: weights[name] for name in self.start})

    def as_trained(self, variant: Variant) -> AbstractContextManager:
        """Return a context in which the model is conditioned as in the variant's training."""
        recipe = self.model.recipe
        if variant.every:
            recipe = replace(
                recipe,
                mask=replace(recipe.mask, mode="zero"),
                adapter=replace(recipe.adapter, conditions="all"),
            )
        return swapped(self.model, recipe=recipe)

    def check_start(self, name: str, weights: dict[str, Tensor]) -> None:
        """Raise ValueError unless a variant has the initial weights of the seed."""
        for key, tensor in self.start.items():
            if not torch.equal(weights[key].to(tensor.dtype), tensor):
                raise ValueError(f"{name} has a different initial {key}, so nothing is timed")

    @torch.no_grad()
    def check_function(self, name: str, variant: Variant, baseline: Baseline) -> None:
        """Raise ValueError unless our model with a baseline's weights has the same loss.

        Called after the baseline's first turn, because initial weights predict zero for every
        condition.
        """
        batch = self.batches[0]
        self.load(baseline.weights())
        with self.as_trained(variant), torch.compiler.set_stance("force_eager"):
            inputs = (batch.pixels_BCHW, batch.vit_pixels_BHWC, batch.n_B, batch.latents_BCHW)
            ours = self.model(*inputs, batch.captions, batch.has_image)[0].item()
            theirs = baseline.loss(batch)
        allowed = 1e-4 if self.config.precision == "fp32" else 2e-2
        print(
            f"loss on one batch with the weights of {name}: {theirs:.6f}, by our model {ours:.6f}"
        )
        if not abs(ours - theirs) <= allowed * ours:
            raise ValueError(f"the relative difference of the losses exceeds {allowed:.0e}")

    @torch.no_grad()
    def __call__(self, variant: Variant, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return {"loss": held-out velocity loss, "score": strict score} of a variant's weights."""
        self.load(weights)
        with self.as_trained(variant), torch.compiler.set_stance("force_eager"):
            with fixed(self.model):
                losses_BT = torch.cat([losses_at(self.model, batch) for batch in self.batches])
            table, _ = grade(
                self.model,
                self.config.data.size_px,
                self.way,
                per_kind=self.per_kind,
                steps=self.draw_steps,
                guidance=GUIDANCE[self.way],
            )
        return {"loss": losses_BT[: self.num_heldout].mean().item(), "score": overall(table)}


class Progress:
    """A variant in training, its own time so far, and its curve.

    `curve` holds lists of equal length by name: the variant's wall seconds `s`, the CPU seconds of
    this process over all threads `cpu_s`, `steps`, and the Evaluator's `loss` and `score`.
    """

    def __init__(self, variant: Variant, trained: Ours | Baseline):
        self.variant, self.trained = variant, trained
        self.s = self.cpu_s = 0.0
        self.steps, self.first_step_s = 0, None
        self.curve = {name: [] for name in (*CLOCKS, "loss", "score")}

    def run(self, seconds: float, num_steps: int) -> None:
        """Train whole steps for about `seconds`, at least one and at most up to step num_steps."""
        self.trained.wait()
        started, started_cpu = time.perf_counter(), time.process_time()
        passed = 0.0
        while passed < seconds and self.steps < num_steps:
            self.trained.step()
            self.steps += 1
            passed = time.perf_counter() - started
            if self.first_step_s is None:
                self.first_step_s = passed
        self.trained.wait()
        self.s += time.perf_counter() - started
        self.cpu_s += time.process_time() - started_cpu

    def add_point(self, found: dict[str, float]) -> None:
        """Add a point to the curve."""
        for name, value in {name: getattr(self, name) for name in CLOCKS}.items():
            self.curve[name].append(value)
        for name, value in found.items():
            self.curve[name].append(value)


# Arithmetic on curves


def best_so_far(values: Sequence[float], falling: bool) -> list[float]:
    """Return the best value up to each point; smaller is better if `falling`."""
    best = np.minimum if falling else np.maximum
    return best.accumulate(np.asarray(values, dtype=float)).tolist()


def crossing(
    times: Sequence[float], values: Sequence[float], target: float, *, falling: bool
) -> float | None:
    """Return when a curve first reaches `target`, or None if it never does.

    Interpolated linearly between the points before and after, on the best value so far.
    """
    best = best_so_far(values, falling)
    reached = [value <= target if falling else value >= target for value in best]
    if True not in reached:
        return None
    i = reached.index(True)
    if i == 0:
        return float(times[0])
    share = (target - best[i - 1]) / (best[i] - best[i - 1])
    return times[i - 1] + share * (times[i] - times[i - 1])


def ratios(
    baseline: Sequence[float | None], other: Sequence[float | None], limits: Sequence[float]
) -> dict | None:
    """Return the ratio of the baseline's time to the other's over the seeds, or None if unknown.

    It is unknown if the other did not reach the target in every seed, or had it from the start.

    Args:
        baseline: when the baseline reached the target in each seed; None if it never did.
        other: the same of the other variant.
        limits: the baseline's total time in each seed. It replaces the time of a seed that never
            reached the target, whose ratio is then a lower bound (`at_least`).
    """
    if not other or not all(other):
        return None
    found = [
        (limit if time is None else time) / its
        for time, its, limit in zip(baseline, other, limits, strict=True)
    ]
    return {
        "median": statistics.median(found),
        "low": min(found),
        "high": max(found),
        "seeds": found,
        "at_least": None in baseline,
    }


def loss_targets(curves: Iterable[dict], shares: Sequence[float] = LOSSES_AT) -> list[float]:
    """Return the held-out losses that all curves have reached after these shares of their time.

    This is the worst loss over the seeds, rounded up to four decimal places.
    """
    curves, found = list(curves), []
    for share in shares:
        at_share = [
            np.interp(share * curve["s"][-1], curve["s"], best_so_far(curve["loss"], True))
            for curve in curves
        ]
        found.append(math.ceil(max(at_share) * 1e4) / 1e4)
    return sorted(set(found), reverse=True)


def reached(runs: Sequence[dict], what: str, target: float) -> list[dict]:
    """Return a row per variant: when it reached the target in each seed, and its ratios.

    Args:
        runs: `runs` of the result file, one per seed.
        what: "loss" or "score".
        target: the value to reach.

    Returns:
        Rows in which `s`, `cpu_s` and `steps` are lists over the seeds. `s_encoded` is `s` plus the
        time of encoding before training, if the variant does that. `ratio`, `ratio_cpu`,
        `ratio_steps` and `ratio_encoded` are the first variant's times over these (see `ratios`).
    """
    rows, first = [], next(iter(runs[0]["curves"]))
    for name in runs[0]["curves"]:
        curves = [run["curves"][name] for run in runs]
        row = {"what": what, "target": target, "variant": name}
        for clock in CLOCKS:
            row[clock] = [
                crossing(curve[clock], curve[what], target, falling=what == "loss")
                for curve in curves
            ]
        row["reached"] = sum(time is not None for time in row["s"])
        if name in runs[0]["encoding_s"]:
            row["s_encoded"] = [
                None if time is None else time + run["encoding_s"][name]
                for time, run in zip(row["s"], runs, strict=True)
            ]
        if name != first:
            clocks = {"ratio": "s", "ratio_cpu": "cpu_s", "ratio_steps": "steps"}
            for ratio, clock in clocks.items():
                limits = [run["curves"][first][clock][-1] for run in runs]
                row[ratio] = ratios(rows[0][clock], row[clock], limits)
            if "s_encoded" in row:
                limits = [run["curves"][first]["s"][-1] for run in runs]
                row["ratio_encoded"] = ratios(rows[0]["s"], row["s_encoded"], limits)
        rows.append(row)
    return rows


def summarise(result: dict) -> None:
    """Compute `targets` and `reached` from the seeds that are done, or from all if none is."""
    runs = [run for run in result["runs"] if run["done"]] or result["runs"]
    first = next(iter(runs[0]["curves"]))
    losses = result["losses_given"] or loss_targets(run["curves"][first] for run in runs)
    result["targets"] = {"loss": list(losses), "score": list(result["scores_given"])}
    result["reached"] = []
    for what, targets in result["targets"].items():
        for target in targets:
            rows = reached(runs, what, target)
            # A quality that no variant has reached is left out.
            if any(row["reached"] for row in rows):
                result["reached"] += rows


# The command


def prepare(args: argparse.Namespace, folder: Path) -> tuple[RunConfig, list[str]]:
    """Return the config of the first seed and the overrides that were added to it.

    Raises:
        InputError: if the baseline does not compute this config.
    """
    changes = [f"run.dir={folder / 'run'}", "evaluate.every_steps=0"]
    changes += ["align.weight=0", "data.latents=null", "train.noise_draws=1"]
    config = load_config(args.config, args.overrides)
    if config.optim.schedule == "constant":
        changes.append("train.steps=1000000")
    if args.threads:
        changes.append(f"train.threads={args.threads}")
    if not config.data.heldout:
        changes.append(f"data.heldout={HELDOUT}")
    config = load_config(args.config, [*args.overrides, *changes])
    if args.stage == "finetune" and config.run.init is None:
        raise InputError(
            "--stage finetune starts from the weights of a stage-1 run: add run.init=RUN"
        )
    expected = {
        "adapter.kind": "rqa",
        "adapter.connector_layers": 0,
        "adapter.attention": "causal",
        "adapter.conditions": "query",
        "mask.mode": "drop",
        "mask.positions": "original",
        "model.vae_sample": False,
        "data.shards": "shapes",
    }
    if config.train.data != "image":
        expected["data.pairs"] = "shapes"
    given = flat(config)
    wrong = [
        f"{key} is {given[key]}, expected {value}"
        for key, value in expected.items()
        if given[key] != value
    ]
    if config.model.generator.kind != "mmdit":
        wrong.append(f"model.preset {config.model.preset} has no FLUX blocks")
    if wrong:
        raise InputError(
            f"the baseline does not implement this config ({'; '.join(wrong)}): change these keys"
        )
    return config, changes


def variant_config(
    variant: Variant, args: argparse.Namespace, changes: Sequence[str], latents: Path
) -> RunConfig:
    """Return the config of a variant's training.

    Raises:
        InputError: if the variant is not possible with the config.
    """
    given = load_config(args.config, args.overrides)
    own = [f"train.noise_draws={max(2, given.train.noise_draws) if variant.drawn else 1}"]
    if variant.aligned:
        own.append(f"align.weight={given.align.weight or ALIGN_WEIGHT}")
    if variant.encoded == "disk":
        own.append(f"data.latents={latents}")
    elif variant.encoded:
        own.append("data.latents=memory")
        # The image tokens in memory are the projector's, which the MLLM reads.
        own += ["align.target=projector", "align.pairs=false"]
    return load_config(args.config, [*args.overrides, *changes, *own])


class Stopwatch:
    """Wraps a function and adds up the seconds of its calls in `s`."""

    def __init__(self, function: Callable):
        self.function, self.s = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.s += time.perf_counter() - started


def start_encoded(
    variant: Variant, own: RunConfig, config: RunConfig, latents: Path, ranks: group.Ranks
) -> tuple[Ours, float]:
    """Encode the images and build the training of a variant that uses them.

    Args:
        variant: the variant.
        own: the variant's config.
        config: the config without encoded latents.
        latents: folder for latents on disk.
        ranks: the joined ranks.

    Returns:
        The training, and the seconds that encoding took.
    """
    if variant.encoded == "disk":
        encode = Stopwatch(builders.write_latents)
        encode(config, latents, dtype="bf16", batch=32)
        return start(variant, own, ranks), encode.s
    encode = Stopwatch(builders.EncodedSamples)
    with swapped(builders, EncodedSamples=encode):
        return start(variant, own, ranks), encode.s


def train_in_turns(
    args: argparse.Namespace,
    ranks: group.Ranks,
    seed: int,
    changes: list[str],
    result: dict,
    folder: Path,
    save: Callable[[], None],
) -> None:
    """Train all variants of a seed in turns.

    Args:
        args: the command line.
        ranks: the joined ranks.
        seed: the run's seed.
        changes: overrides that were added to the config.
        result: content of the result file; the seed's curves are added to its `runs`.
        folder: for encoded latents.
        save: called after every turn.
    """
    changes = [*changes, f"run.seed={seed}"]
    config = load_config(args.config, [*args.overrides, *changes])
    run = {
        "seed": seed,
        "done": False,
        "encoding_s": {},
        "curves": {},
        "first_step_s": {},
    }
    evaluator = Evaluator(config, ranks, per_kind=args.per_kind, draw_steps=args.draw_steps)
    in_training, at_start = {}, {}
    for name in args.variants:
        variant = VARIANTS[name]
        try:
            own = variant_config(variant, args, changes, latents := folder / f"latents-{seed}")
            if variant.encoded:
                trained, run["encoding_s"][name] = start_encoded(
                    variant, own, config, latents, ranks
                )
            else:
                trained = start(variant, own, ranks)
        except InputError as error:
            if name not in result["left_out"]:
                print(f"{name} is skipped: {error}", flush=True)
            result["left_out"][name] = str(error)
            continue
        progress = Progress(variant, trained)
        evaluator.check_start(name, trained.averaged())
        if variant.every not in at_start:
            at_start[variant.every] = evaluator(variant, evaluator.start)
        progress.add_point(at_start[variant.every])
        in_training[name], run["curves"][name] = progress, progress.curve
    if not in_training:
        raise InputError("none of the variants can run with this config")
    result["runs"].append(run)
    turn, num_steps = 0, config.train.steps

    def ended(progress: Progress) -> bool:
        return progress.s >= args.seconds or progress.steps >= num_steps

    while not all(ended(progress) for progress in in_training.values()):
        names = list(in_training)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress = in_training[name]
            if ended(progress):
                continue
            progress.run(min(args.slice, args.seconds - progress.s), num_steps)
            if progress.variant.baseline and len(progress.curve["s"]) == 1:
                evaluator.check_function(name, progress.variant, progress.trained)
            found = evaluator(progress.variant, progress.trained.averaged())
            progress.add_point(found)
            run["first_step_s"][name] = progress.first_step_s
            save()
            print(
                f"seed {seed}  {name:<13}{progress.s:>8.1f} s {progress.steps:>7} steps   "
                f"loss {found['loss']:.4f}   score {found['score']:.2f}",
                flush=True,
            )
        turn += 1
    run["done"] = True
    for progress in in_training.values():
        progress.trained.batches.close()
    save()


def picture(result: dict, path: Path) -> None:
    """Draw the curves of all seeds over training time, a colour per variant."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no PNG: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(12, 4.5))
    words = {"loss": "held-out velocity loss", "score": "strict score"}
    for axis, (what, label_y) in zip(figure.subplots(1, 2), words.items(), strict=True):
        for run in result["runs"]:
            for i, (name, curve) in enumerate(run["curves"].items()):
                shown = name if run is result["runs"][0] else None
                axis.plot(curve["s"], curve[what], color=f"C{i}", alpha=0.7, label=shown)
        for target in result["targets"][what]:
            axis.axhline(target, color="0.8", linewidth=0.8, zorder=0)
        axis.set_xlabel("training time of the variant [s]")
        axis.set_ylabel(label_y)
    figure.axes[0].legend(fontsize=8)
    if all(min(curve["loss"]) > 0 for run in result["runs"] for curve in run["curves"].values()):
        figure.axes[0].set_yscale("log")
    figure.suptitle(
        f"{result['config']}, {len(result['runs'])} seed(s), {result['machine']['device']}, "
        f"{result['machine']['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def run_study(
    args: argparse.Namespace,
    ranks: group.Ranks,
    config: RunConfig,
    changes: list[str],
    folder: Path,
) -> Path:
    """Run all seeds, write and print the results, and return the path of the result file."""
    launch.prepare_process(config, ranks)
    facts, stem = machine(), Path(args.config).stem
    name = f"{label(f'time-to-quality-{stem}', args.overrides)}-{ranks.device.type}-{facts['date']}"
    path = Path(args.results) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": facts | {"load": os.getloadavg()[0], "threads": torch.get_num_threads()},
        "config": args.config,
        "stage": args.stage,
        "overrides": args.overrides,
        "changed": [change for change in changes if not change.startswith("run.dir=")],
        "precision": config.precision,
        "compiled": config.train.compiled(ranks.device),
        "seconds": args.seconds if args.seconds < math.inf else None,
        "steps": config.train.steps if config.optim.schedule != "constant" else None,
        "slice_s": args.slice,
        "heldout": config.data.heldout,
        "way": "image" if config.train.data == "image" else "text",
        "pictures": len(KINDS) * args.per_kind,
        "draw_steps": args.draw_steps,
        "scorer": scorer.VERSION,
        "losses_given": args.losses,
        "scores_given": args.scores,
        "left_out": {},
        "runs": [],
    }

    def save() -> None:
        summarise(result)
        write(path, result)

    for seed in range(config.run.seed, config.run.seed + args.seeds):
        train_in_turns(args, ranks, seed, changes, result, folder, save)
        picture(result, path.with_suffix(".png"))
        gc.collect()
    for what, figure in time_to_quality(result):
        print(f"{what}: {figure}")
    print(path)
    return path


def listed(kind: Callable) -> Callable[[str], list]:
    """Return an argparse type for distinct values of a kind, separated by commas."""
    return lambda text: list(dict.fromkeys(kind(item) for item in text.split(",")))


def variant_name(text: str) -> str:
    """Parse the name of a variant; "plain" is the old spelling of "baseline"."""
    name = baseline_name(text)
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(VARIANTS)}")
    return name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=tuple(launch.STAGES), default="pretrain")
    parser.add_argument("--config", help="default: the stage's demo")
    parser.add_argument("--seconds", type=positive(float), help="training time per variant")
    parser.add_argument("--slice", type=positive(float), default=20.0, help="seconds per turn")
    parser.add_argument("--seeds", type=positive(int), default=3)
    parser.add_argument(
        "--variants",
        type=listed(variant_name),
        default=list(DEFAULT),
        help="separated by commas; the others are compared with the first one",
    )
    parser.add_argument(
        "--losses",
        type=listed(positive(float)),
        default=[],
        help="held-out losses to reach, separated by commas; default: the first variant's after a "
        "quarter, half and all of its time",
    )
    parser.add_argument(
        "--scores",
        type=listed(positive(float)),
        default=list(SCORES),
        help="strict scores to reach, separated by commas",
    )
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default: all cores")
    parser.add_argument(
        "--per-kind",
        type=positive(int),
        default=8,
        help="pictures to score per kind of caption",
    )
    parser.add_argument(
        "--draw-steps", type=positive(int), default=20, help="Euler steps per picture"
    )
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    args.config = args.config or launch.STAGES[args.stage]
    with tempfile.TemporaryDirectory() as folder:
        config, changes = prepare(args, Path(folder))
        if args.seconds is None:
            args.seconds = CONSTANT_S if config.optim.schedule == "constant" else math.inf
        try:
            run_study(args, group.start(600), config, changes, Path(folder))
        finally:
            group.stop()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
