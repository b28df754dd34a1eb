"""Build the parts of a run from its config: data, frozen models, trained model.

Shared by training and by the console command.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from iomm.adapter import Connector, QueryAdapter
from iomm.alignment import PREFIX, AlignmentHead
from iomm.config import InputError
from iomm.engine.config import FROM_INIT, load_config, positive
from iomm.engine.data.buckets import BucketSampler, bucket_sizes, share_buckets
from iomm.engine.data.index import (
    ensure_index,
    find_index,
    is_index,
    load,
    records_crc32,
    warnings_on,
)
from iomm.engine.data.latents import EncodedSamples, LatentStore, write_cache
from iomm.engine.data.mixture import Joined, MixtureSampler, num_images_per_batch
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler, held_out
from iomm.engine.data.shards import Shards
from iomm.engine.data.sizes import Upscaled, upscaled_squares
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import Rules
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes import check_weights
from iomm.engine.shapes import mllm as shapes_mllm
from iomm.engine.shapes import vae as shapes_vae
from iomm.engine.shapes.dataset import write_dataset
from iomm.generator import empty_generator
from iomm.internvl import load_mllm
from iomm.layout import from_diffusers_config
from iomm.model import IOMM, Recipe
from iomm.vae import load_vae, vae_without_weights
from iomm.weights import initialize_generator, load_module, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from iomm.engine.config import RunConfig
    from iomm.engine.parallel.ranks import Ranks
    from iomm.mllm import MLLM
    from iomm.vae import Latents

logger = logging.getLogger("iomm")


def cache_dir(config: RunConfig) -> Path:
    """Return the folder that all runs in one folder share: the rendered dataset and indexes."""
    return Path(config.run.dir).parent / "shared"


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
    data, cache = config.data, cache_dir(config)
    shards = data_shards(config, pairs)
    if not shards:
        raise InputError(
            "data.pairs is empty, but train.data needs text-image pairs: give tars, globs or "
            "folders"
        )
    if (data.pairs if pairs else data.shards) == "shapes":
        number, seed = shapes_number_and_seed(config, pairs)
        write_dataset(Path(shards), num_images=number, seed=seed)
    index_dir = ensure_index(
        shards, cache / "index", rules=data_rules(config, pairs), progress=progress
    )
    if progress:
        for sentence in warnings_on(load(index_dir)):
            logger.warning(sentence)
    return str(index_dir)


def shapes_number_and_seed(config: RunConfig, pairs: bool) -> tuple[int, int]:
    """Return the number of pictures and the seed of the rendered images, or pairs."""
    data, seed = config.data, config.run.seed
    return (data.num_pairs, seed + 1000) if pairs else (data.num_images, seed)


def data_shards(config: RunConfig, pairs: bool) -> str | None:
    """Return data.shards or data.pairs, where "shapes" is the folder of the rendered dataset."""
    shards = config.data.pairs if pairs else config.data.shards
    if shards != "shapes":
        return shards
    number, seed = shapes_number_and_seed(config, pairs)
    return str(cache_dir(config) / f"shapes-{number}-seed{seed}")


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
    shards = data_shards(config, pairs)
    rendered = (config.data.pairs if pairs else config.data.shards) == "shapes"
    if not shards or (rendered and not Path(shards).is_dir()):
        return None
    folder = find_index(shards, cache_dir(config) / "index", data_rules(config, pairs))
    return None if folder is None else str(folder)


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
    data, batch = config.data, config.train.global_batch
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
        micro_batch=config.train.micro_batch or max(1, batch // ranks.size),
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
        dtype=torch.bfloat16 if data.precision == "bf16" else torch.float32,
        hw_decoder_load=data.hw_decoder_load,
        resize=data.resize,
        look_at_pairs=config.align.weight > 0 and config.align.pairs,
    )


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


def share(rank: int | None = None, num_ranks: int | None = None) -> tuple[int, int, str]:
    """Return (rank, number of ranks, device) of a process that shares work without a connection.

    Arguments that are None are read from the environment, as torchrun sets it.

    Raises:
        InputError: the rank is out of range.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    num_ranks = int(os.environ.get("WORLD_SIZE", 1)) if num_ranks is None else num_ranks
    if not 0 <= rank < num_ranks:
        raise InputError(f"--rank must be from 0 to --ranks - 1, got {rank} of {num_ranks}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    return rank, num_ranks, device


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
        f"Train with data.latents={out}"
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
        align=config.align,
        align_share=config.align_share,
    )


def build_model(config: RunConfig, device: torch.device | str) -> IOMM:
    """Return the model: frozen parts on `device`, trained parts drawn from run.seed on the CPU."""
    mllm = load_mllm(
        mllm_name(config),
        revision=config.model.mllm_revision,
        dtype=config.dtype,
        device=device,
        vit_px=config.model.vit_px,
    )
    return assemble(config, mllm, new_vae(config, device))


def assemble(
    config: RunConfig, mllm: MLLM, vae: Latents, *, device: torch.device | str | None = None
) -> IOMM:
    """Return the IOMM of a run around its frozen parts.

    device: None draws the trained parts from run.seed on the CPU. Otherwise they are on that device
    with weights that are still to be loaded, or on "meta" without any.

    Raises:
        InputError: data.size_px is not a multiple of the VAE's patch.
    """
    vae.grid(config.data.size_px, config.data.size_px)
    if config.model.mllm_precision == "fp8":
        mllm.use_fp8()
    shape = replace(config.model.generator, token_dim=vae.token_dim, condition_dim=mllm.width)
    adapter = connector = alignment = None
    with torch.device("cpu" if device is None else device):
        if config.adapter.kind != "none":
            adapter = QueryAdapter(config.adapter, mllm.width)
        if config.adapter.connector_layers:
            connector = Connector(config.adapter, mllm.width)
        if config.align.weight:
            alignment = AlignmentHead(config.align, shape.width, mllm)
    generator = empty_generator(shape, device="cpu" if device is None else device)
    if device is None:
        for part in (generator, adapter, connector, alignment):
            if part is not None:
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
    return load_config(str(path)), folder


def load_run(
    run_dir: str | Path, *, weights: str = "ema", device: torch.device | str = "cpu"
) -> tuple[RunConfig, IOMM, dict[str, Any]]:
    """Return (config, model, manifest) of a run folder's newest intact checkpoint.

    The model is not sharded. Its weights are in the run's precision on a GPU, as in training, and
    in float32 on a CPU.
    """
    config, folder = read_run(run_dir)
    model = build_model(config, device).to(device)
    # Only training needs the alignment head.
    model.alignment = None
    manifest = load_weights(model, folder, weights)
    if torch.device(device).type == "cuda" and config.dtype == torch.bfloat16:
        model.to(torch.bfloat16)
    return config, model, manifest


@torch.no_grad()
def load_weights(
    model: torch.nn.Module, folder: str | Path, weights: str = "ema"
) -> dict[str, Any]:
    """Load a checkpoint, written by any number of ranks, into a model that is not sharded.

    The alignment head is loaded only if both have the same one, since stages may differ in it.

    Args:
        model: its parameters are overwritten.
        folder: the checkpoint.
        weights: "ema", or "raw" for the fp32 masters, which are also used if the run has no
            average.

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
            parameter.copy_(reader.full(slot, name))
    return reader.manifest


def without_head(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict by parameter name without the alignment head's entries."""
    return {name: value for name, value in by_name.items() if not name.startswith(PREFIX)}
