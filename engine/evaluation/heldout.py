"""Evaluation between two training steps: held-out loss, samples and their scores, a user's hook.

The loss is the velocity loss of held-out samples at fixed times. On the shapes dataset the sampled
pictures are scored. The hook adds metrics of the user. Evaluation does not affect the run: with or
without it, training is the same to the bit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iomm.config import InputError
from iomm.engine.config import RunConfig
from iomm.engine.data.mixture import Joined
from iomm.engine.data.samplers import SequentialSampler, held_out_entries
from iomm.engine.data.source import Batch, ImageSource
from iomm.engine.evaluation.sample import save_grid, size_text, visible_parts
from iomm.engine.evaluation.shapes_grades import SCORE_KEYS, mean
from iomm.engine.shapes.scorer import CAPTION
from iomm.engine.shapes.scorer import score as score_picture
from iomm.flow import velocity_loss
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.model import IOMM, grid
from iomm.pipeline import sample_pixels, to_images

if TYPE_CHECKING:
    from iomm.engine.parallel.ranks import Ranks

logger = logging.getLogger("iomm")

Hook = Callable[[RunConfig, int, list[Image.Image], list[str | None]], dict[str, float]]

# Between image (0) and noise (1).
TIMES = tuple((i + 0.5) / 8 for i in range(8))
# Seed of masks, noise and samples. It does not depend on run.seed, so runs are compared on the same
# random numbers.
SEED = 0
# First sample number of an evaluation. The numbers of training samples are lower.
FIRST_N = 1 << 62
# The scores that every caption has: fits, number, colours, shapes.
SCORED = SCORE_KEYS[:4]


class Pictures(NamedTuple):
    """The pictures of an evaluation."""

    # Rows of the grid, all of the same length: "drawn" are the samples. When they come from masked
    # images, "original" and "visible" precede it. Empty if nothing was sampled.
    rows: dict[str, list[Image.Image]]
    # None for a sample from a masked image.
    prompts: list[str | None]

    @property
    def samples(self) -> list[Image.Image]:
        """The sampled pictures."""
        return self.rows.get("drawn", [])


class Evaluation:
    """Evaluates the weights of a run. Call it after a step, on all ranks.

    A call returns plain values for a row of log.jsonl, the same on all ranks:

        heldout_loss  {"image" and / or "pair": {"mean", "by_time": one per entry of TIMES}} of the
                      data.heldout samples of each kind. They are square centre crops, masked as in
                      training, with captions never dropped and one noise per sample.
        samples       Path of the grid in run.dir/samples: samples from prompts, or masked images
        with
                      the visible part and the sample from it below.
        scores        Shapes dataset only: {"fits", "number", "colours", "shapes"}, the shares of
        the
                      samples that match their prompt, or the caption of the masked image
                      (shapes/scorer.py).
        metrics       The values that the hook returned.

    The weights are the average if the run keeps one, otherwise the trained ones. Micro-batches do
    not depend on the number of ranks, and each is processed by one rank. The same weights therefore
    give the same numbers on any number of ranks.
    """

    def __init__(
        self, config: RunConfig, source: ImageSource, ranks: Ranks, hook: Hook | None = None
    ):
        """Select the held-out samples and the pictures of the grid.

        Args:
            config: the run's config.
            source: the run's source.
            ranks: all ranks of the run.
            hook: hook(config, step, images, prompts) -> {name: number}, called on rank 0. Images
                are PIL images, prompts their texts (None for a sample from a masked image).

        Raises:
            InputError: if data.heldout leaves no samples to train on.
        """
        self.config, self.ranks, self.hook, self.source = config, ranks, hook, source
        shards, num = source.shards, config.evaluate.num_images
        images, pairs = shards, None
        if isinstance(shards, Joined):
            images, pairs = shards.images, shards.pairs
        first_pair = len(images) if images is not None else 0
        # Index entries by kind.
        self.heldout: dict[str, np.ndarray] = {}
        self.pictured: dict[str, np.ndarray] = {}
        for kind, part, first in (("image", images, 0), ("pair", pairs, first_pair)):
            if part is None:
                continue
            self.heldout[kind] = first + held_out_entries(part.shard_sizes, config.data.heldout)
            if config.data.heldout:
                self.pictured[kind] = self.heldout[kind][:num]
            else:
                self.pictured[kind] = first + np.arange(min(num, len(part)))
        self.scored = config.data.shards == config.model.mllm == "shapes"
        self.prompts = [
            text.strip() for text in (config.evaluate.prompts or "").split("|") if text.strip()
        ]
        if not self.prompts and pairs is not None:
            self.prompts = [shards.caption(k) for k in self.pictured["pair"].tolist()]
        if source.caption_limit is not None:
            fitting = [source.caption_limit.cut(prompt) for prompt in self.prompts]
            if config.evaluate.prompts and fitting != self.prompts and ranks.first:
                logger.warning(
                    "warning: evaluate.prompts has prompts that exceed the MLLM's context, and "
                    "these are cut"
                )
            self.prompts = fitting

    def due(self, step: int) -> bool:
        """Return whether an evaluation follows this step."""
        every = self.config.evaluate.every_steps
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def __call__(self, state: Any) -> dict[str, Any]:
        """Evaluate the weights of a run's state, engine.state.State."""
        results, step = {}, state.step
        # Eager mode: the shapes of an evaluation must not enter the graphs that torch.compile made
        # for training.
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
            results["heldout_loss"] = losses
        if pictures.samples:
            metadata = {
                "run": self.config.run.dir,
                "step": step,
                "weights": "ema" if state.ema.flats else "raw",
            }
            results["samples"] = self.ranks.on_first(lambda: self.write_grid(metadata, pictures))
            if self.scored and (scores := self.ranks.on_first(lambda: self.score(step, pictures))):
                results["scores"] = scores
        if self.hook is not None:
            results["metrics"] = self.ranks.on_first(
                lambda: self.call_hook(step, pictures.samples, pictures.prompts)
            )
        return results

    def batches(self, kind: str, entries: np.ndarray) -> ImageSource:
        """Return this rank's micro-batches of these samples, the same number on every rank.

        The last sample is repeated to fill the last micro-batches.
        """
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
            sampler=SequentialSampler(entries, config.data.size_px, pairs=kind == "pair"),
            dtype=source.decoder.dtype,
            hw_decoder_load=config.data.hw_decoder_load,
            resize=config.data.resize,
            caption_limit=source.caption_limit,
        )

    def loss(self, model: IOMM, kind: str) -> dict[str, Any]:
        """Return {"mean", "by_time"} of the held-out samples of a kind, the same on all ranks."""
        local = [
            (batch.n_B.tolist(), losses_at(model, batch).tolist())
            for batch in self.batches(kind, self.heldout[kind])
        ]
        by_n = {
            n: losses
            for part in self.ranks.all(local)
            for n_B, losses_BT in part
            for n, losses in zip(n_B, losses_BT, strict=True)
        }
        by_time = np.mean([by_n[n] for n in range(len(self.heldout[kind]))], axis=0)
        return {"mean": float(by_time.mean()), "by_time": by_time.tolist()}

    def pictures(self, model: IOMM) -> Pictures:
        """Sample the pictures of the grid, each on one rank, and gather them on all ranks."""
        evaluate, local = self.config.evaluate, []
        settings = dict(size_px=self.config.data.size_px, steps=evaluate.steps, seed=SEED)
        if not evaluate.num_images:
            return Pictures({}, [])
        if self.prompts:
            num, size = evaluate.num_images, self.ranks.size
            m = min(evaluate.micro_batch, num)
            for first in range(self.ranks.rank * m, -(-num // (m * size)) * m * size, m * size):
                numbers = list(range(first, first + m))
                condition = model.frozen[0].condition(
                    [
                        model.recipe.prompt.text_of(self.prompts[n % len(self.prompts)])
                        for n in numbers
                    ]
                )
                number_B = torch.tensor(numbers, device=self.ranks.device)
                pixels_BCHW = sample_pixels(
                    model, condition, number_B, guidance=evaluate.guidance, **settings
                )
                local += zip(numbers, to_images(pixels_BCHW), strict=True)
            prompts = [self.prompts[n % len(self.prompts)] for n in range(num)]
            return Pictures(self.gathered(local, num, "drawn"), prompts)
        for batch in self.batches("image", self.pictured["image"]):
            condition = model.condition(batch.vit_pixels_BHWC, batch.n_B + FIRST_N)
            if batch.latents_BCHW is None:
                pixels_BCHW = batch.pixels_BCHW
            else:
                pixels_BCHW = model.frozen[1].decode(batch.latents_BCHW)
            originals = to_images(pixels_BCHW)
            n_B = batch.n_B.to(self.ranks.device)
            samples = to_images(sample_pixels(model, condition, n_B, **settings))
            visible = visible_parts(model, batch.n_B + FIRST_N, originals)
            local += zip(batch.n_B.tolist(), originals, visible, samples, strict=True)
        num = len(self.pictured["image"])
        return Pictures(self.gathered(local, num, "original", "visible", "drawn"), [None] * num)

    def gathered(self, local: Iterable[tuple], num: int, *names: str) -> dict[str, list]:
        """Gather the rows (number, one picture per name) of every rank on all ranks.

        Returns {name: the first num pictures, in order}.
        """
        rows = [row for part in self.ranks.all(local) for row in part if row[0] < num]
        rows.sort(key=lambda row: row[0])
        return {name: [row[i] for row in rows] for i, name in enumerate(names, 1)}

    def write_grid(self, metadata: dict[str, Any], pictures: Pictures) -> str | None:
        """Write the grid and return its path. Log a warning and return None on failure."""
        evaluate, prompts = self.config.evaluate, pictures.prompts
        step = metadata["step"]
        path = Path(self.config.run.dir) / "samples" / f"evaluate-{step:08d}.png"
        labels = [prompt or f"masked image {i}" for i, prompt in enumerate(prompts)]
        metadata |= {
            "size": size_text(self.config.data.size_px),
            "steps": evaluate.steps,
            "seed": SEED,
            "guidance": f"{evaluate.guidance if self.prompts else 1:g}",
            "prompt": "\n".join(dict.fromkeys(filter(None, prompts))),
        }
        try:
            save_grid(pictures.rows, labels, path, metadata)
        except OSError as error:
            logger.warning(f"step {step}: the sample grid was not written: {error}")
            return None
        return str(path)

    def score(self, step: int, pictures: Pictures) -> dict[str, float]:
        """Return the shares of SCORED, or {} if no prompt is a caption of the shapes dataset.

        Errors are logged, never raised.
        """
        try:
            captions = pictures.prompts
            if not self.prompts:
                captions = map(self.source.shards.caption, self.pictured["image"].tolist())
            known = [
                (picture, caption)
                for picture, caption in zip(pictures.samples, captions, strict=True)
                if CAPTION.fullmatch(caption)
            ]
            if not known:
                return {}
            scores = [score_picture(picture, caption) for picture, caption in known]
            return {key: mean(one[key] for one in scores) for key in SCORED}
        except Exception as error:
            logger.warning(
                f"step {step}: the samples were not scored: {type(error).__name__}: {error}"
            )
            return {}

    def call_hook(
        self, step: int, images: list[Image.Image], prompts: list[str | None]
    ) -> dict[str, float]:
        """Return the hook's values as floats. Its errors are logged, never raised."""
        try:
            return {
                str(name): float(value)
                for name, value in self.hook(self.config, step, images, prompts).items()
            }
        except Exception as error:
            logger.warning(f"step {step}: the hook failed: {type(error).__name__}: {error}")
            return {}


@contextmanager
def fixed(model: IOMM) -> Iterator[None]:
    """Make the model's randomness independent of the run.

    Masks and noise use SEED, no caption is dropped, and latents are the mean of the VAE's
    posterior.
    """
    recipe = model.recipe
    model.recipe = replace(recipe, seed=SEED, caption_drop=0.0, sample_latents=False)
    try:
        yield
    finally:
        model.recipe = recipe


def losses_at(model: IOMM, batch: Batch) -> Tensor:
    """Return the velocity loss of each sample at each of TIMES, (B, times) float64 on the CPU.

    The condition of a sample is encoded once for all times.
    """
    vae, host_n_B = model.frozen[1], batch.n_B + FIRST_N
    n_B = host_n_B.to(batch.vit_pixels_BHWC.device)
    latents_BCHW = batch.latents_BCHW
    if latents_BCHW is None:
        latents_BCHW = model.encode(batch.pixels_BCHW, n_B)
    condition = model.condition(batch.vit_pixels_BHWC, host_n_B, batch.captions, batch.has_image)
    hidden_BCD, lengths_B = model.encode_condition(condition)
    losses = []
    for t in TIMES:
        t_B = torch.full((len(n_B),), t, device=n_B.device)
        noisy_BNK, target_BNK = noisy_tokens(latents_BCHW, t_B, SEED, n_B, vae.patch)
        image_grid = grid(latents_BCHW, vae.patch)
        velocity_BNK = model.velocity(noisy_BNK, t_B, hidden_BCD, lengths_B, image_grid)
        losses.append(velocity_loss(velocity_BNK, target_BNK)[1])
    return torch.stack(losses, dim=1).double().cpu()


def load_hook(name: str) -> Hook:
    """Import the function "package.module:function".

    Only the user may type this name on the command line. No file of a run or a dataset may contain
    one.

    Raises:
        InputError: if the import fails or the result is not callable.
    """
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--hook {name}: {error}; expected package.module:function that Python can import"
        ) from error
    if not callable(hook):
        raise InputError(f"--hook {name}: {function} is not a function")
    return hook
