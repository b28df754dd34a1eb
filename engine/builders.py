"""Build the parts of a run from its config: data, frozen models, trained model.

Shared by training and by the console command.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
import zlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from iomm import lora
from iomm.adapter import Connector, QueryAdapter
from iomm.alignment import PREFIX, AlignmentHead
from iomm.caption_limit import CaptionLimit
from iomm.config import InputError, PromptConfig
from iomm.engine.arguments import whole_variable
from iomm.engine.config import FROM_INIT, load_config, positive
from iomm.engine.cores import num_cores
from iomm.engine.data.buckets import BucketSampler, bucket_sizes, share_buckets
from iomm.engine.data.index import (
    ensure_index,
    find_index,
    is_index,
    load,
    omissions,
    records_crc32,
    warnings_on,
)
from iomm.engine.data.latents import EncodedSamples, LatentStore, write_cache
from iomm.engine.data.mixture import Joined, MixtureSampler, num_images_per_batch
from iomm.engine.data.patterns import absolute
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler, held_out
from iomm.engine.data.shards import Shards
from iomm.engine.data.sizes import Upscaled, count_long, upscaled_squares
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import Rules
from iomm.engine.parallel.base_shards import BaseShards
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes import check_weights
from iomm.engine.shapes import mllm as shapes_mllm
from iomm.engine.shapes import vae as shapes_vae
from iomm.engine.shapes.dataset import is_dataset, write_dataset
from iomm.generator import empty_generator
from iomm.internvl import load_mllm, load_tokenizer, mllm_without_weights
from iomm.layout import from_diffusers_config
from iomm.model import IOMM, Recipe, draw_turns
from iomm.vae import Autoencoder, load_vae, vae_without_weights
from iomm.weights import initialize_generator, load_module, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from iomm.engine.config import RunConfig
    from iomm.engine.parallel.ranks import Ranks
    from iomm.mllm import MLLM
    from iomm.vae import Latents

logger = logging.getLogger("iomm")

# No MLLM has so small a context that a caption of this length, which has at most as many tokens,
# does not fit. The smallest one, of tests, has 256 tokens.
SHORT_CAPTION_BYTES = 192


def resolved(config: RunConfig, base: str | Path = ".") -> RunConfig:
    """Return a config whose names of files and folders are absolute.

    A run therefore finds its data and weights whatever folder its config.yaml is read from.

    Args:
        config: the run's config.
        base: folder that relative names refer to.
    """
    run, model, data, cache = config.run, config.model, config.data, config.cache
    base = Path(base).absolute()

    def path(name: str | None) -> str | None:
        return None if name is None else os.path.normpath(base / os.path.expanduser(name))

    def weights(name: str) -> str:
        # A hub id, "shapes" or another name that is not a folder keeps its meaning.
        named = name == "shapes" or not (base / os.path.expanduser(name)).is_dir()
        return name if named else path(name)

    def shards(name: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return name if name in (None, "shapes") else absolute(name, base)

    return replace(
        config,
        run=replace(run, dir=path(run.dir), init=path(run.init)),
        model=replace(model, mllm=weights(model.mllm), vae=weights(model.vae)),
        data=replace(
            data,
            shards=shards(data.shards),
            pairs=shards(data.pairs),
            latents=data.latents if data.latents == "memory" else path(data.latents),
        ),
        cache=replace(cache, dir=path(cache.dir)),
    )


def saved_config(run_dir: str | Path) -> RunConfig:
    """Return the config of a run folder, wherever the folder is now, with absolute names.

    Earlier versions saved names relative to the folder in which the run was started. That is the
    folder from which the saved run.dir leads to `run_dir`, or else the current one.
    """
    config = load_config(str(Path(run_dir) / "config.yaml"))
    started, base = Path(os.path.normpath(config.run.dir)), Path.cwd()
    depth = len(started.parts)
    # The second one is where a link to the run leads.
    folders = [Path(os.path.abspath(run_dir)), Path(os.path.realpath(run_dir))]
    for folder in folders:
        if not started.is_absolute() and folder.parts[-depth:] == started.parts:
            base = folder.parents[depth - 1]
    config = resolved(config, base)
    return replace(config, run=replace(config.run, dir=str(folders[0])))


def cache_folders(config: RunConfig) -> list[Path]:
    """Return the folders in which rendered data and indexes may be, the preferred one first.

    All runs in one folder share the first one.
    """
    if config.cache.dir is not None:
        return [Path(config.cache.dir)]
    # A link to a run means the folder that it leads to.
    run_dir = Path(os.path.realpath(config.run.dir))
    own = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(own):
        # A process without a home, as in a container.
        own = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return [run_dir.parent / "shared", run_dir / "shared", Path(own) / "iomm"]


def cache_dir(config: RunConfig) -> Path:
    """Return the first of cache_folders() that can be written, and create it.

    Raises:
        InputError: none of them can be written.
    """
    reasons = []
    for folder in cache_folders(config):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reasons.append(f"{folder} cannot be written ({error.strerror})")
            continue
        if reasons:
            logger.warning(
                "warning: %s; rendered data and indexes go to %s. Set cache.dir to choose a folder",
                "; ".join(reasons),
                folder,
            )
        return folder
    raise InputError(
        f"{'; '.join(reasons)}. Set cache.dir to a writable folder for rendered data and indexes"
    )


def prepare_data(config: RunConfig, progress: bool = True, pairs: bool = False) -> str:
    """Render the shapes dataset if the run uses it, index the data and return the index folder.

    Called on one rank. Data and indexes that already exist are reused.

    Args:
        config: the run's config.
        progress: show a bar and log warnings about the data.
        pairs: index data.pairs, whose samples must have captions, instead of data.shards.

    Raises:
        InputError: no shard, no image, or a shard that has changed since it was indexed.
    """
    if not (config.data.pairs if pairs else config.data.shards):
        raise InputError(
            "data.pairs is empty, but train.data needs text-image pairs: give tars, globs or "
            "folders"
        )
    index_dir = find_data(config, pairs)
    if index_dir is None:
        cache = cache_dir(config)
        shards = data_shards(config, pairs, cache)
        if is_rendered(config, pairs):
            number, seed = shapes_number_and_seed(config, pairs)
            write_dataset(Path(shards), num_images=number, seed=seed)
        index_dir = ensure_index(
            shards, cache / "index", rules=data_rules(config, pairs), progress=progress
        )
    if progress:
        index = load(index_dir)
        for sentence in warnings_on(index):
            logger.warning(sentence)
        for sentence in omissions(index):
            logger.info(f"{index_dir}: {sentence}")
    return str(index_dir)


def shapes_number_and_seed(config: RunConfig, pairs: bool) -> tuple[int, int]:
    """Return the number of pictures and the seed of the rendered images, or pairs."""
    data, seed = config.data, config.run.seed
    return (data.num_pairs, seed + 1000) if pairs else (data.num_images, seed)


def is_rendered(config: RunConfig, pairs: bool) -> bool:
    """Return whether data.shards or data.pairs is the rendered dataset."""
    return (config.data.pairs if pairs else config.data.shards) == "shapes"


def data_shards(config: RunConfig, pairs: bool, cache: Path) -> str | tuple[str, ...] | None:
    """Return data.shards or data.pairs, where "shapes" is a folder of rendered data in `cache`."""
    if not is_rendered(config, pairs):
        return config.data.pairs if pairs else config.data.shards
    number, seed = shapes_number_and_seed(config, pairs)
    return str(cache / f"shapes-{number}-seed{seed}")


def data_rules(config: RunConfig, pairs: bool) -> Rules:
    """Return the rules for good samples of data.shards or data.pairs."""
    data = config.data
    return Rules(
        min_size_px=data.min_size_px,
        max_aspect=data.max_aspect,
        max_pixels=data.max_pixels,
        captions="required" if pairs else "optional",
    )


def find_data(config: RunConfig, pairs: bool = False) -> str | None:
    """Return the index folder that prepare_data would return, or None if it is not built yet.

    Nothing is rendered or indexed.

    Raises:
        InputError: no shard, or an index given as data.shards or data.pairs is out of date.
    """
    for cache in cache_folders(config):
        shards = data_shards(config, pairs, cache)
        if not shards:
            return None
        if is_rendered(config, pairs):
            number, seed = shapes_number_and_seed(config, pairs)
            if not is_dataset(Path(shards), num_images=number, seed=seed):
                continue
        folder = find_index(shards, cache / "index", data_rules(config, pairs))
        if folder is not None:
            return str(folder)
    return None


def count_upscaled(
    config: RunConfig, index_dir: str | None, pairs_dir: str | None
) -> dict[str, Upscaled]:
    """Return how many images of each index are upscaled, by "images" and "pairs' images"."""
    size_px = config.data.size_px
    shards = {
        noun: Shards(folder)
        for noun, folder in (("images", index_dir), ("pairs' images", pairs_dir))
        if folder is not None
    }
    if not config.data.buckets:
        return {
            noun: upscaled_squares(of_kind.index.records, size_px)
            for noun, of_kind in shards.items()
        }
    # The buckets depend on the sizes that the VAE allows and on the number of samples in each.
    vae = vae_without_weights(vae_name(config), config.model.patch)
    order = make_order(config, shards.get("images"), shards.get("pairs' images"), vae)
    samplers = {"images": order}
    if isinstance(order, MixtureSampler):
        samplers = {"images": order.images, "pairs' images": order.pairs}
    return {
        noun: sampler.upscaled(size_px) for noun, sampler in samplers.items() if sampler is not None
    }


def check_upscaling(
    config: RunConfig, index_dir: str | None, pairs_dir: str | None = None
) -> list[str]:
    """Count the images that are smaller than the run's crops, and return sentences on them.

    There is one with the share for the images, and one for the pairs, where there are any. The last
    one says what to do, unless data.upscale is allow.

    Raises:
        InputError: data.upscale is refuse, and there are some.
    """
    data = config.data
    counts = count_upscaled(config, index_dir, pairs_dir)
    found = {noun: upscaled for noun, upscaled in counts.items() if upscaled.num}
    sentences = [upscaled.sentence(noun) for noun, upscaled in found.items()]
    if not sentences or data.upscale == "allow":
        return sentences
    accept = "warn" if data.upscale == "refuse" else "allow"
    advice = f"a smaller data.size_px, or data.upscale={accept} to accept them"
    # If all were too small, none would be left.
    if all(upscaled.num < upscaled.total for upscaled in found.values()):
        least_px = max(upscaled.enough_px for upscaled in found.values())
        # An index that is given keeps the rules that it was built with.
        given = (index_dir and is_index(data.shards)) or (pairs_dir and is_index(data.pairs))
        least = (
            f"--min-size={least_px} of `iomm index`" if given else f"data.min_size_px={least_px}"
        )
        advice = f"{least} to leave them out, {advice}"
    sentences.append(f"Set {advice}")
    if data.upscale == "refuse":
        raise InputError(f"data.upscale is refuse, but {'. '.join(sentences)}")
    return sentences


def report_upscaling(
    config: RunConfig, index_dir: str | None, pairs_dir: str | None = None
) -> None:
    """Log what check_upscaling returns, as a warning unless data.upscale is allow.

    Raises:
        InputError: see check_upscaling.
    """
    sentences = check_upscaling(config, index_dir, pairs_dir)
    if sentences and config.data.upscale == "allow":
        logger.info(". ".join(sentences))
    elif sentences:
        logger.warning(f"warning: {'. '.join(sentences)}")


def long_captions(config: RunConfig, index_dir: str | Path, mllm: MLLM | None = None) -> list[str]:
    """Return a warning if an index has captions that exceed the MLLM's context, else nothing.

    Args:
        config: config of the run.
        index_dir: the index of its pairs.
        mllm: the MLLM. None: its tokenizer is loaded, but only if a caption is suspiciously long.

    Raises:
        InputError: the MLLM's context has no room for captions.
    """
    shards = Shards(index_dir)
    longest = int(shards.index.records["caption_bytes"].max(initial=0))
    if longest <= SHORT_CAPTION_BYTES:
        return []
    if mllm is None:
        name, revision = mllm_name(config), config.model.mllm_revision
        try:
            mllm = mllm_without_weights(name, revision)
            rest = config.adapter.num_queries + len(config.prompt.caption.encode())
            if longest + rest + SHORT_CAPTION_BYTES <= mllm.max_positions:
                return []
            mllm.tokenizer = load_tokenizer(name, revision)
        except InputError as error:
            # It may be on a hub that this machine cannot reach.
            return [f"captions that exceed the MLLM's context were not counted: {error}"]
    found = count_long(shards, CaptionLimit(mllm, config.adapter, config.prompt))
    return [f"warning: {found.sentence(config.model.mllm)}"] if found.num else []


def check_prompts(config: RunConfig, mllm: MLLM) -> None:
    """Check that the run's own prompts fit into the MLLM's context.

    A prompt that is drawn per sample could otherwise end the run at any step.

    Raises:
        InputError: a prompt is too long, or there is no room for captions.
    """
    checked = [("prompt.empty", [config.prompt.empty], False)]
    if config.train.data != "pair":
        checked.append(("prompt.reconstruct", config.prompt.reconstruct, True))
    for key, texts, edit in checked:
        # Like an instruction, a prompt has no template, and images follow it.
        limit = CaptionLimit(mllm, config.adapter, PromptConfig(), edit=edit)
        for text in texts:
            if limit.cut(text) != text:
                raise InputError(
                    f"{key} has a prompt of {limit.num_tokens(text):,} tokens, but "
                    f"{limit.max_tokens:,} fit into the context of model.mllm. Shorten it"
                )


def open_source(
    config: RunConfig,
    ranks: Ranks,
    mllm: MLLM,
    vae: Latents,
    *,
    index_dir: str | None = None,
    pairs_dir: str | None = None,
) -> ImageSource:
    """Return the batches of a run from step 0.

    They hold images of index_dir, pairs of pairs_dir, or both in the ratio data.mix.
    """
    data, batch, micro_batch = config.data, config.train.global_batch, config.train.micro_batch
    assert micro_batch != "auto", "dry_run.with_micro_batch comes first"
    if micro_batch is None:
        micro_batch = max(1, batch // ranks.size)
    check_prompts(config, mllm)
    images, pairs = (Shards(folder) if folder else None for folder in (index_dir, pairs_dir))
    shards = images if pairs is None else Joined(images, pairs)
    latents = None
    if data.latents == "memory":
        latents = EncodedSamples(
            shards, mllm, vae, size_px=data.size_px, ranks=ranks, num_threads=data.threads
        )
    elif data.latents:
        latents = LatentStore(
            data.latents, images.index, vae=config.model.vae, size_px=data.size_px
        )
    return ImageSource(
        shards,
        seed=config.run.seed,
        global_batch=batch,
        micro_batch=micro_batch,
        rank=ranks.rank,
        world_size=ranks.size,
        size_px=data.size_px,
        vit_px=mllm.vit_px,
        device=ranks.device,
        start_step=0,
        num_steps=config.train.steps,
        flip=data.flip,
        num_threads=data.threads,
        crop=data.crop,
        sampler=make_order(config, images, pairs, vae),
        latents=latents,
        dtype=pixel_dtype(config, vae, ranks.device),
        hw_decoder_load=data.hw_decoder_load,
        resize=data.resize,
        look_at_pairs=config.align.weight > 0 and config.align.pairs,
        caption_limit=CaptionLimit(mllm, config.adapter, config.prompt),
        # Not the model's own method: an evaluation changes the model's recipe for a while.
        draw_turns=partial(draw_turns, make_recipe(config), mllm),
    )


def pixel_dtype(config: RunConfig, vae: Latents, device: torch.device) -> torch.dtype:
    """Return the type of a run's decoded pixels.

    On a GPU, an autoencoder in bf16 gets bf16 whatever data.precision is: it rounds its input
    first, so its latents are the same, and the pixels take half of the memory.
    """
    rounds = isinstance(vae, Autoencoder) and vae.backbone.dtype == torch.bfloat16
    if config.data.precision == "bf16" or (rounds and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def make_order(
    config: RunConfig, images: Shards | None, pairs: Shards | None, vae: Latents
) -> FixedSizeSampler | BucketSampler | MixtureSampler:
    """Return the sampler of a run: squares or buckets, of images, pairs or both.

    images or pairs is None if the run has none of that kind. The data.heldout samples of each kind
    are left out.
    """
    data, seed, batch = config.data, config.run.seed, config.train.global_batch

    def sampler(shards: Shards, num: int) -> FixedSizeSampler | BucketSampler | None:
        if not num:
            return None
        kept = held_out(shards.shard_sizes, data.heldout)
        if data.buckets:
            return BucketSampler(
                seed,
                shards.index,
                num,
                bucket_sizes(data.size_px, vae.factor * vae.patch),
                held_out=kept,
            )
        return FixedSizeSampler(
            EpochPermutation(seed, shards.shard_sizes, held_out=kept), data.size_px
        )

    if pairs is None:
        plan = sampler(images, batch)
        if plan.total < batch:
            raise InputError(
                f"train.global_batch is {batch}, but there are only {plan.total} samples to train "
                "on: lower it or add data"
            )
        return plan
    num_images = num_images_per_batch(data.mix, batch) if images is not None else 0
    plans = sampler(images, num_images), sampler(pairs, batch - num_images)
    if data.buckets and all(plans):
        share_buckets(*plans)
    return MixtureSampler(seed, batch, num_images, *plans, len(images) if images is not None else 0)


def data_facts(shards: Shards | Joined) -> dict[str, list[int]]:
    """Return what determines the order of a run's samples, as plain values for a checkpoint.

    {"images" and / or "pairs": [number of samples, CRC-32 of their records and of the shard
    sizes]}. A checkpoint can only be resumed on data with the same facts.
    """
    kinds = (
        {"images": shards.images, "pairs": shards.pairs}
        if isinstance(shards, Joined)
        else {"images": shards}
    )
    return {
        kind: [
            len(of_kind),
            zlib.crc32(
                np.asarray(of_kind.shard_sizes, "<i8").tobytes(), records_crc32(of_kind.index)
            ),
        ]
        for kind, of_kind in kinds.items()
        if of_kind is not None
    }


def check_data(
    config: RunConfig, step: int | str, images: Shards | None = None, pairs: Shards | None = None
) -> None:
    """Check that indexed data are those that a run's checkpoint of a step was trained on.

    Raises:
        InputError: the names in the config lead to other data now.
    """
    folder = Path(config.run.dir) / "checkpoints" / f"step-{int(step):08d}"
    # Checkpoints of earlier versions do not record their data.
    saved = checkpoint_reader.read_manifest(folder).get("data") or {}
    current = data_facts(images if pairs is None else Joined(images, pairs))
    for kind, facts in current.items():
        if facts != saved.get(kind, facts):
            names = config.data.shards if kind == "images" else config.data.pairs
            raise InputError(
                f"{names} holds {facts[0]} {kind}, which are not the {saved[kind][0]} that "
                f"{folder} was trained on. Put them back, or give a --prompt to sample from"
            )


def share(rank: int | None = None, num_ranks: int | None = None) -> tuple[int, int, str]:
    """Return (rank, number of ranks, device) of a process that shares work without a connection.

    Arguments that are None are read from the environment, as torchrun sets it.

    Raises:
        InputError: the rank is out of range.
    """
    rank = whole_variable("RANK", 0) if rank is None else rank
    num_ranks = whole_variable("WORLD_SIZE", 1) if num_ranks is None else num_ranks
    if not 0 <= rank < num_ranks:
        raise InputError(f"--rank must be from 0 to --ranks - 1, got {rank} of {num_ranks}")
    limit_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    return rank, num_ranks, device


def limit_threads() -> None:
    """Use as many threads as this process has cores: torch ignores the quotas of containers."""
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))


def write_latents(
    config: RunConfig,
    out: str | Path,
    *,
    dtype: str,
    batch: int,
    rank: int | None = None,
    num_ranks: int | None = None,
) -> str:
    """Write this rank's files of the latent cache of a run's images.

    Ranks need no connection.

    Args:
        config: the run's config.
        out: folder of the cache.
        dtype: "bf16" or "fp16".
        batch: images encoded at once.
        rank: this process among num_ranks; default from the environment, see share().
        num_ranks: number of processes that share the work.

    Returns:
        A summary in one line.
    """
    rank, num_ranks, device = share(rank, num_ranks)
    positive("--batch", batch)
    config = resolved(config)
    index_dir = prepare_data(config, progress=rank == 0)
    if rank == 0:
        report_upscaling(config, index_dir)
    else:
        check_upscaling(config, index_dir)
    shards = Shards(index_dir)
    # Loaded as in training, so the latents are the ones that training would compute.
    vae = new_vae(config, device)
    with tqdm(
        total=-(-len(shards) // num_ranks),
        unit="image",
        desc="cache",
        disable=None if rank == 0 else True,
    ) as bar:
        num = write_cache(
            shards,
            out,
            vae,
            vae_name=config.model.vae,
            size_px=config.data.size_px,
            dtype=dtype,
            device=device,
            batch=batch,
            num_threads=config.data.threads,
            rank=rank,
            num_ranks=num_ranks,
            progress=bar.update,
        )
    return (
        f"rank {rank} of {num_ranks}: {num:,} of {len(shards):,} latents written to {out}. "
        f"Train with {shlex.quote(f'data.latents={out}')}"
    )


def mllm_name(config: RunConfig) -> str:
    """Return the name of the MLLM to load: a hub id or a folder."""
    return shipped(config.model.mllm, shapes_mllm.WEIGHTS)


def shipped(name: str, folder: Path) -> str:
    """Return `name`, or for "shapes" the folder of the weights that ship with the package.

    Raises:
        InputError: these weights are damaged.
    """
    if name != "shapes":
        return name
    check_weights(folder)
    return str(folder)


def vae_name(config: RunConfig) -> str:
    """Return the name of the VAE to load: pixel:<patch>, random:<shape>, a hub id or a folder."""
    return shipped(config.model.vae, shapes_vae.WEIGHTS)


def foreign_data(config: RunConfig) -> list[str]:
    """Return a warning for each part that was trained on the shapes dataset but gets other data."""
    keys = {"image": ("shards",), "pair": ("pairs",), "mix": ("shards", "pairs")}[config.train.data]
    other = [f"data.{key}" for key in keys if getattr(config.data, key) != "shapes"]
    shipped_parts = [part for part in ("vae", "mllm") if getattr(config.model, part) == "shapes"]
    advice = {"vae": "an AutoencoderKL trained on photographs", "mllm": "an InternVL checkpoint"}
    return [
        f"warning: model.{part}=shapes was trained only on the shapes dataset, but "
        f"{' and '.join(other)} is other data. Set model.{part} to {advice[part]}"
        for part in shipped_parts
        if other
    ]


def new_vae(config: RunConfig, device: torch.device | str) -> Latents:
    """Return the frozen VAE of a run on `device`."""
    return load_vae(vae_name(config), patch=config.model.patch, dtype=config.dtype, device=device)


def make_recipe(config: RunConfig) -> Recipe:
    """Return the settings of a run that the model itself needs."""
    return Recipe(
        seed=config.run.seed,
        prompt=config.prompt,
        mask=config.mask,
        adapter=config.adapter,
        time=asdict(config.time),
        sample_latents=config.model.vae_sample,
        caption_drop=config.train.caption_drop,
        noise_draws=config.train.noise_draws,
        route=config.route,
        align=config.align,
        align_share=config.align_share,
        lora=config.lora,
    )


def build_model(
    config: RunConfig,
    device: torch.device | str,
    ranks: Ranks | None = None,
    *,
    dtype: torch.dtype | None = None,
    shards: BaseShards | None = None,
) -> IOMM:
    """Return the model on `device`, with trained parts drawn from run.seed.

    With LoRA, generator, adapter and connector are frozen too: they have the weights of run.init,
    and the fresh A and B are beside them.

    Args:
        config: the run's config.
        device: device of all parts.
        ranks: with LoRA, all ranks call this together if given, as in read_run.
        dtype: dtype of the base of LoRA, by default the run's.
        shards: with LoRA, cuts the base over the ranks of the node, and reads only this rank's
            part of it.
    """
    mllm = load_mllm(
        mllm_name(config),
        revision=config.model.mllm_revision,
        dtype=config.dtype,
        device=device,
        vit_px=config.model.vit_px,
    )
    vae = new_vae(config, device)
    if not config.lora.rank:
        return assemble(config, mllm, vae, device=device)
    model = assemble(
        config,
        mllm,
        vae,
        device=device,
        fresh=False,
        dtype=dtype or config.dtype,
        shards=shards,
    )
    copy = Tensor.copy_ if shards is None else shards.copy
    logger.info(load_base(model, config, ranks, copy))
    model.add_lora()
    return model


def base_shards(config: RunConfig, ranks: Ranks) -> BaseShards | None:
    """Return what shards the base of LoRA over the ranks of this node.

    None without lora.shard_base, or if this rank is the only one of its node. Called by all ranks
    together.
    """
    if not config.lora.shard_base:
        return None
    shards = BaseShards(ranks, config.train.timeout_s)
    if min(shards.sizes) == 1:
        logger.warning(
            "warning: lora.shard_base changes nothing on a node with one rank, such as "
            f"{shards.sizes.count(1)} of this run's {len(shards.sizes)}"
        )
    return shards if shards.size > 1 else None


def assemble(
    config: RunConfig,
    mllm: MLLM,
    vae: Latents,
    *,
    device: torch.device | str = "cpu",
    fresh: bool = True,
    dtype: torch.dtype = torch.float32,
    shards: BaseShards | None = None,
) -> IOMM:
    """Return the IOMM of a run around its frozen parts, still without LoRA.

    Args:
        config: the run's config.
        mllm: the frozen MLLM.
        vae: the frozen VAE.
        device: device of the trained parts; "meta" for a model without weights.
        fresh: draw the trained parts from run.seed. The numbers do not depend on the device: one
            weight at a time is drawn on the CPU. Otherwise the weights are still to be loaded.
        dtype: dtype of the trained parts.
        shards: cuts the generator's blocks over the ranks of the node.

    Raises:
        InputError: data.size_px is not a multiple of the VAE's patch.
    """
    vae.grid(config.data.size_px, config.data.size_px)
    if config.model.mllm_precision == "fp8":
        mllm.use_fp8()
    shape = replace(config.model.generator, token_dim=vae.token_dim, condition_dim=mllm.width)
    adapter = connector = alignment = None
    with torch.device(device):
        if config.adapter.kind != "none":
            adapter = QueryAdapter(config.adapter, mllm.width)
        if config.adapter.connector_layers:
            connector = Connector(config.adapter, mllm.width)
        if config.align.weight:
            alignment = AlignmentHead(config.align, shape.width, mllm)
    if shards is None:
        generator = empty_generator(shape, device=device, dtype=dtype)
    else:
        generator = shards.empty_generator(shape, dtype)
    for part in (generator, adapter, connector, alignment):
        if part is not None:
            part.to(dtype)
            if fresh:
                part.init_weights(config.run.seed)
    return IOMM(generator, adapter, mllm, vae, make_recipe(config), connector, alignment)


def diffusers_folder(init: str | Path) -> Path | None:
    """Return the folder of a diffusers generator's config.json, or None for anything else.

    init: run.init, the generator's folder or that of a pipeline with a `transformer` folder.
    """
    if (Path(init) / "config.yaml").is_file():
        return None
    for folder in (Path(init), Path(init) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    return None


def with_generator_shape(config: RunConfig) -> RunConfig:
    """Return the config with model.shape set if model.preset is "from-init".

    A run that was started before keeps its shape, whatever became of run.init since.

    Raises:
        InputError: run.init is missing or describes no generator that this engine supports.
    """
    if config.model.preset != FROM_INIT or config.model.shape is not None:
        return config
    saved, init = Path(config.run.dir) / "config.yaml", config.run.init
    if saved.is_file() and (shape := load_config(str(saved)).model.shape) is not None:
        return replace(config, model=replace(config.model, shape=shape))
    if init is None:
        # Raises InputError, which says what to set.
        _ = config.model.generator
    if (folder := diffusers_folder(init)) is not None:
        path = folder / "config.json"
        generator, _ = from_diffusers_config(read_json(path), path, ignored=("guidance_embeds",))
    elif (Path(init) / "config.yaml").is_file():
        generator = load_config(str(Path(init) / "config.yaml")).model.generator
    else:
        raise InputError(
            f"run.init: {init} is neither a run folder nor the folder of a diffusers model: it has "
            "no config.yaml, config.json or transformer/config.json"
        )
    return replace(config, model=replace(config.model, shape=json.dumps(asdict(generator))))


def load_foreign_weights(model: IOMM, folder: Path) -> str:
    """Initialize the trained parts from a diffusers folder and return a description in lines."""
    done = initialize_generator(model.generator, folder, patch=model.frozen[1].patch)
    total = len(done.taken) + len(done.fresh)
    lines = [f"initialized with {len(done.taken)} of the generator's {total} tensors of {folder}"]
    for name in ("adapter", "connector"):
        part, path = getattr(model, name), folder / f"{name}.safetensors"
        if part is not None and path.is_file():
            load_module(part, path)
            lines.append(f"  and with {path}")
    lines += [f"  fresh: {name} ({reason})" for name, reason in done.fresh.items()]
    if done.unused:
        lines.append(f"  not used: {', '.join(done.unused)}")
    return "\n".join(lines)


def load_base(
    model: IOMM,
    config: RunConfig,
    ranks: Ranks | None = None,
    copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> str:
    """Load the weights of run.init as the base of LoRA, and return a description.

    Called by all ranks together if `ranks` is given. `copy` copies a tensor to a parameter.

    Raises:
        InputError: run.init does not have all weights of the model, or it is a run with LoRA.
    """
    init = config.run.init
    if (folder := diffusers_folder(init)) is None:
        base, folder = read_run(init, ranks)
        if base.lora.rank:
            raise InputError(
                f"run.init: {init} is itself a run with LoRA and cannot be a base: write it with "
                f"`iomm export --run {init} --merge` and give the exported folder"
            )
        averaged = load_weights(model, folder, config.run.init_weights, copy)["ema"]
        return f"LoRA base: {config.run.init_weights if averaged else 'raw'} weights of {folder}"
    patch = model.frozen[1].patch
    missing = initialize_generator(model.generator, folder, patch=patch, copy=copy).fresh
    for name in ("adapter", "connector"):
        part, path = getattr(model, name), folder / f"{name}.safetensors"
        if part is not None and path.is_file():
            load_module(part, path)
        elif part is not None:
            missing[name] = f"{path} is missing"
    if missing:
        name, reason = next(iter(missing.items()))
        raise InputError(
            f"run.init: {folder} lacks weights of {len(missing)} parts, such as {name} ({reason}). "
            "The base of LoRA is not trained, so it must be complete: set model.* and adapter.* as "
            "the base has them, or train the missing parts first, with lora.rank=0"
        )
    return f"LoRA base: {folder}"


def base_facts(
    config: RunConfig, model: IOMM, shards: BaseShards | None = None
) -> dict[str, str] | None:
    """Return what identifies the base of LoRA, for a checkpoint: its source and its checksum.

    None for a run without LoRA. Called by all ranks together if the base is sharded.
    """
    if not config.lora.rank:
        return None
    gather = None if shards is None else shards.gather
    return {"source": config.run.init, "checksum": lora.checksum(model, gather=gather)}


def check_base(
    folder: Path | str, saved: dict[str, str] | None, current: dict[str, str] | None
) -> None:
    """Compare the base that a checkpoint was trained on with the one that is loaded.

    Both are results of base_facts.

    Raises:
        InputError: they differ.
    """
    if saved and current and saved["checksum"] != current["checksum"]:
        raise InputError(
            f"{folder} was trained on another base than {current['source']} is now (checksum "
            f"{current['checksum']}, expected {saved['checksum']}): restore the weights that "
            f"{saved['source']} had"
        )


def read_run(run_dir: str | Path, ranks: Ranks | None = None) -> tuple[RunConfig, Path]:
    """Return the config of a run folder and its newest intact checkpoint.

    ranks: if given, all ranks call this together, verify a share of the files each and return the
    same checkpoint.

    Raises:
        InputError: there is no config or no intact checkpoint.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{run_dir} is not a run folder: it has no config.yaml. Give the run.dir of a "
            "training run"
        )
    folder = checkpoint_reader.newest(Path(run_dir) / "checkpoints", ranks)
    if folder is None:
        raise InputError(
            f"{run_dir} has no intact checkpoint. Train first, or wait until step "
            "checkpoint.every_steps"
        )
    return saved_config(run_dir), folder


def load_run(
    run_dir: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    mllm: str | None = None,
    vae: str | None = None,
) -> tuple[RunConfig, IOMM, dict[str, Any]]:
    """Return (config, model, manifest) of a run folder's newest intact checkpoint.

    The model is not sharded. Its weights are in the run's precision on a GPU, as in training, and
    in float32 on a CPU. mllm and vae replace the names in the run's config. With LoRA it has the
    base and, beside it, A and B of the checkpoint.

    Raises:
        InputError: there is no intact checkpoint, or the base of LoRA has changed.
    """
    config, folder = read_run(run_dir)
    model = config.model
    if mllm is not None:
        model = replace(model, mllm=mllm, mllm_revision=None)
    if vae is not None:
        model = replace(model, vae=vae)
    config = replace(config, model=model)
    dtype = config.dtype if torch.device(device).type == "cuda" else torch.float32
    model = build_model(config, device, dtype=dtype).to(device)
    # Only training needs the alignment head.
    model.alignment = None
    manifest = load_weights(model, folder, weights)
    check_base(folder, manifest.get("base"), base_facts(config, model))
    return config, model.to(dtype), manifest


@torch.no_grad()
def load_weights(
    model: torch.nn.Module,
    folder: str | Path,
    weights: str = "ema",
    copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> dict[str, Any]:
    """Load a checkpoint, written by any number of ranks, into a model that is not sharded.

    The alignment head is loaded only if both have the same one, since stages may differ in it.

    Args:
        model: its parameters are overwritten.
        folder: the checkpoint.
        weights: "ema", or "raw" for the fp32 masters, which are also used if the run has no
            average.
        copy: copies a tensor of the checkpoint to a parameter.

    Returns:
        The checkpoint's manifest.

    Raises:
        InputError: the checkpoint belongs to another model.
    """
    reader = checkpoint_reader.Reader(folder)
    slot = "ema" if weights == "ema" and reader.manifest["ema"] else "master"
    parameters, shapes = dict(model.named_parameters()), reader.manifest["shapes"]
    wanted, found = set(without_head(parameters)), set(without_head(shapes))
    if wanted != found:
        raise InputError(
            f"{folder} is a checkpoint of another model: it lacks {sorted(wanted - found)[:3]} and "
            f"has the unknown {sorted(found - wanted)[:3]}"
        )
    for name, parameter in parameters.items():
        if name in wanted or shapes.get(name) == list(parameter.shape):
            copy(parameter, reader.full(slot, name))
    return reader.manifest


def without_head(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict by parameter name without the alignment head's entries."""
    return {name: value for name, value in by_name.items() if not name.startswith(PREFIX)}
