"""Between two training steps: the velocity loss of held-out samples at fixed times, pictures drawn and, in the shapes world,
scored, metrics of the user's own.

Nothing of it touches the run: with it or without, training goes on to the same bits.
"""

import importlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from iomm.config import InputError
from iomm.engine.data.mixture import Joined
from iomm.engine.data.samplers import InARow, held_out_entries
from iomm.engine.data.source import ImageSource
from iomm.engine.evaluation.sample import save_grid, size_text, visible_parts
from iomm.engine.evaluation.shapes_grades import ASKED, mean
from iomm.engine.shapes.scorer import CAPTION
from iomm.engine.shapes.scorer import score as score_picture
from iomm.flow import velocity_loss
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.model import grid
from iomm.pipeline import draw, to_images

# Between image (0) and noise (1)
TIMES = tuple((i + 0.5) / 8 for i in range(8))
# Of masks, noise and pictures, whatever run.seed: runs are compared on the same numbers.
SEED = 0
# Sample numbers from here on, which no training sample bears.
FIRST_N = 1 << 62
# What is asked of every caption: fits, number, colours, shapes.
SCORED = ASKED[:4]


class Pictures(NamedTuple):
    """What an evaluation has drawn: rows of a grid, all of one length; {} where nothing is drawn."""

    # "drawn"; where masked images are drawn "original" and "visible" above it
    rows: dict[str, list[Image.Image]]
    # None for what is drawn of a masked image
    prompts: list[str | None]

    @property
    def drawn(self) -> list[Image.Image]:
        return self.rows.get("drawn", [])


class Evaluation:
    """Call it after a step, on all ranks alike -> what it found, as plain values for a row of log.jsonl:

    heldout_loss  {"image" and / or "pair": {"mean", "by_time": one for each of TIMES}}, of the data.heldout samples of each
                  kind: square centre crops, masked as in training, captions never dropped, one noise a sample
    samples       path of the grid in run.dir/samples: pictures of prompts, or masked images with their visible part and what
                  is drawn from that below
    scores        in the shapes world: {"fits", "number", "colours", "shapes"}, the shares of these pictures that show what
                  their prompt, or the caption of the masked image, names (shapes/score.py)
    metrics       what the hook returned

    Weights are the average where the run keeps one, else those that train. Samples go through in micro-batches that do not
    depend on the number of ranks, each whole on one rank: the same weights give the same numbers on any number.
    """

    def __init__(self, config, source, ranks, hook=None):
        """source: the run's ImageSource. hook(config, step, images, prompts) -> {name: number}, on rank 0: images are PIL,
        prompts their texts (None for what was drawn of a masked image). Raises InputError.
        """
        self.config, self.ranks, self.hook, self.source = config, ranks, hook, source
        shards, num = source.shards, config.evaluate.num_images
        images, pairs = (
            (shards.images, shards.pairs) if isinstance(shards, Joined) else (shards, None)
        )
        # Index entries by kind.
        self.heldout, self.drawn = {}, {}
        for kind, its, first in (
            ("image", images, 0),
            ("pair", pairs, len(images) if images is not None else 0),
        ):
            if its is not None:
                self.heldout[kind] = first + held_out_entries(its.shard_sizes, config.data.heldout)
                self.drawn[kind] = (
                    self.heldout[kind][:num]
                    if config.data.heldout
                    else first + np.arange(min(num, len(its)))
                )
        self.scored = config.data.shards == config.model.mllm == "shapes"
        self.prompts = [
            text.strip() for text in (config.evaluate.prompts or "").split("|") if text.strip()
        ]
        if not self.prompts and pairs is not None:
            self.prompts = [shards.caption(k) for k in self.drawn["pair"].tolist()]

    def due(self, step):
        every = self.config.evaluate.every_steps
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def __call__(self, state):
        found, step = {}, state.step
        # eager: the shapes met here must not enter the graphs that torch.compile made for training
        with (
            state.sharded.with_weights(state.ema.flats) as model,
            fixed(model),
            torch.compiler.set_stance("force_eager"),
        ):
            losses = {
                kind: self.loss(model, kind)
                for kind, entries in self.heldout.items()
                if len(entries)
            }
            pictures = self.pictures(model)
        if losses:
            found["heldout_loss"] = losses
        if pictures.drawn:
            facts = {
                "run": self.config.run.dir,
                "step": step,
                "weights": "ema" if state.ema.flats else "raw",
            }
            found["samples"] = self.ranks.on_first(lambda: self.show(facts, pictures))
            if self.scored and (scores := self.ranks.on_first(lambda: self.score(step, pictures))):
                found["scores"] = scores
        if self.hook is not None:
            found["metrics"] = self.ranks.on_first(
                lambda: self.ask(step, pictures.drawn, pictures.prompts)
            )
        return found

    def batches(self, kind, entries):
        """This rank's micro-batches of these samples, as many on every rank: the last sample fills up the last of them."""
        config, source, size = self.config, self.source, self.ranks.size
        micro_batch = min(config.evaluate.micro_batch, len(entries))
        return ImageSource(
            source.shards,
            seed=SEED,
            global_batch=micro_batch * size,
            micro_batch=micro_batch,
            rank=self.ranks.rank,
            world_size=size,
            size_px=config.data.size_px,
            vit_px=source.decoder.vit_px,
            device=source.decoder.device,
            num_steps=-(-len(entries) // (micro_batch * size)),
            num_threads=config.data.threads,
            latents=None if source.encoded else source.latents,
            plan=InARow(entries, config.data.size_px, pairs=kind == "pair"),
            dtype=source.decoder.dtype,
            hw_decoder_load=config.data.hw_decoder_load,
            resize=config.data.resize,
        )

    def loss(self, model, kind):
        """-> {"mean", "by_time"} of the held-out samples of a kind, alike on all ranks."""
        mine = [
            (batch.n_B.tolist(), losses_at(model, batch).tolist())
            for batch in self.batches(kind, self.heldout[kind])
        ]
        by_n = {
            n: losses
            for part in self.ranks.all(mine)
            for n_B, losses_BT in part
            for n, losses in zip(n_B, losses_BT)
        }
        by_time = np.mean([by_n[n] for n in range(len(self.heldout[kind]))], axis=0)
        return {"mean": float(by_time.mean()), "by_time": by_time.tolist()}

    def pictures(self, model) -> Pictures:
        """Draw the grid's pictures, each on one rank, and gather them on all."""
        evaluate, mine = self.config.evaluate, []
        settings = dict(size_px=self.config.data.size_px, steps=evaluate.steps, seed=SEED)
        if not evaluate.num_images:
            return Pictures({}, [])
        if self.prompts:
            num, m, size = (
                evaluate.num_images,
                min(evaluate.micro_batch, evaluate.num_images),
                self.ranks.size,
            )
            for first in range(self.ranks.rank * m, -(-num // (m * size)) * m * size, m * size):
                numbers = list(range(first, first + m))
                condition = model.frozen[0].condition(
                    [self.prompts[n % len(self.prompts)] for n in numbers]
                )
                number_B = torch.tensor(numbers, device=self.ranks.device)
                mine += zip(
                    numbers,
                    to_images(
                        draw(model, condition, number_B, guidance=evaluate.guidance, **settings)
                    ),
                )
            prompts = [self.prompts[n % len(self.prompts)] for n in range(num)]
            return Pictures(self.gathered(mine, num, "drawn"), prompts)
        for batch in self.batches("image", self.drawn["image"]):
            n_B = batch.n_B.to(self.ranks.device)
            condition = model.condition(batch.vit_pixels_BHWC, n_B + FIRST_N)
            looks = (
                batch.pixels_BCHW
                if batch.latents_BCHW is None
                else model.frozen[1].decode(batch.latents_BCHW)
            )
            originals, drawn = to_images(looks), to_images(draw(model, condition, n_B, **settings))
            visible = visible_parts(model, n_B + FIRST_N, originals)
            mine += zip(batch.n_B.tolist(), originals, visible, drawn)
        num = len(self.drawn["image"])
        return Pictures(self.gathered(mine, num, "original", "visible", "drawn"), [None] * num)

    def gathered(self, mine, num, *names):
        """(number, picture of each name ...) of every rank -> {name: the first num pictures, in
        order}, on all of them.
        """
        rows = [row for part in self.ranks.all(mine) for row in part if row[0] < num]
        rows.sort(key=lambda row: row[0])
        return {name: [row[i] for row in rows] for i, name in enumerate(names, 1)}

    def show(self, facts, pictures):
        """Writes the grid; returns its path, or None where it cannot be written."""
        evaluate, prompts = self.config.evaluate, pictures.prompts
        path = Path(self.config.run.dir) / "samples" / f"evaluate-{facts['step']:08d}.png"
        labels = [prompt or f"masked image {i}" for i, prompt in enumerate(prompts)]
        facts |= {
            "size": size_text(self.config.data.size_px),
            "steps": evaluate.steps,
            "seed": SEED,
            "guidance": f"{evaluate.guidance if self.prompts else 1:g}",
            "prompt": "\n".join(dict.fromkeys(filter(None, prompts))),
        }
        try:
            save_grid(pictures.rows, labels, path, facts)
        except OSError as error:
            print(f"step {facts['step']}: no picture: {error}", flush=True)
            return None
        return str(path)

    def score(self, step, pictures) -> dict[str, float]:
        """Return the shares of SCORED, or {} for prompts that are no captions of the shapes world.

        Errors are printed and stop nothing.
        """
        try:
            captions = pictures.prompts
            if not self.prompts:
                captions = map(self.source.shards.caption, self.drawn["image"].tolist())
            known = [pair for pair in zip(pictures.drawn, captions) if CAPTION.fullmatch(pair[1])]
            if not known:
                return {}
            verdicts = [score_picture(picture, caption) for picture, caption in known]
            return {key: mean(verdict[key] for verdict in verdicts) for key in SCORED}
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            print(f"step {step}: the pictures are not scored: {problem}", flush=True)
            return {}

    def ask(self, step, images, prompts):
        """What the hook returns, as floats; its errors are said and stop nothing."""
        try:
            return {
                str(name): float(value)
                for name, value in self.hook(self.config, step, images, prompts).items()
            }
        except Exception as error:
            print(f"step {step}: the hook failed: {type(error).__name__}: {error}", flush=True)
            return {}


@contextmanager
def fixed(model):
    """The model with masks and noise that do not depend on the run, no caption dropped, the VAE's mean for latents."""
    recipe = model.recipe
    model.recipe = replace(recipe, seed=SEED, caption_drop=0.0, sample_latents=False)
    try:
        yield
    finally:
        model.recipe = recipe


def losses_at(model, batch):
    """Velocity loss of each sample at each of TIMES, (B, times) float64 on the CPU. Its condition is read once."""
    vae, n_B = model.frozen[1], batch.n_B.to(batch.vit_pixels_BHWC.device) + FIRST_N
    latents_BCHW = (
        batch.latents_BCHW
        if batch.latents_BCHW is not None
        else model.encode(batch.pixels_BCHW, n_B)
    )
    read = model.read(model.condition(batch.vit_pixels_BHWC, n_B, batch.captions, batch.has_image))
    losses = []
    for t in TIMES:
        t_B = torch.full((len(n_B),), t, device=n_B.device)
        noisy_BNK, target_BNK = noisy_tokens(latents_BCHW, t_B, SEED, n_B, vae.patch)
        losses.append(
            velocity_loss(
                model.velocity(noisy_BNK, t_B, *read, grid(latents_BCHW, vae.patch)), target_BNK
            )[1]
        )
    return torch.stack(losses, dim=1).double().cpu()


def load_hook(name):
    """ "package.module:function" -> the function. Only for names that the user types: no file of a run or a data set may
    bear one. Raises InputError.
    """
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--hook {name}: {error}; wanted package.module:function that Python can import"
        ) from error
    if not callable(hook):
        raise InputError(f"--hook {name}: {function} is not a function")
    return hook
