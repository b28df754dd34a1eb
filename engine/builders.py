"""RunConfig -> the parts of a run: data, frozen models, trained model. Shared by training and by the console command."""

import os
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from iomm.adapter import Connector, QueryAdapter
from iomm.alignment import PREFIX, AlignmentHead
from iomm.config import InputError, generator_config
from iomm.engine.config import load_config, positive
from iomm.engine.data.buckets import BucketSampler, bucket_sizes, share_buckets
from iomm.engine.data.index import ensure_index, load, records_crc32, warnings_on
from iomm.engine.data.latents import EncodedSamples, LatentStore, write_cache
from iomm.engine.data.mixture import Joined, MixtureSampler, num_images_per_batch
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler, held_out
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import Rules
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes import check_weights
from iomm.engine.shapes import mllm as shapes_mllm
from iomm.engine.shapes import vae as shapes_vae
from iomm.engine.shapes.dataset import write_dataset
from iomm.generator import empty_generator
from iomm.internvl import load_mllm
from iomm.model import IOMM, Recipe
from iomm.vae import load_vae


def cache_dir(config):
    """What runs share lies beside them: the shapes world, indexes."""
    return Path(config.run.dir).parent / "shared"


def prepare_data(config, progress=True, pairs=False):
    """Draws the shapes world if that is what is trained on, indexes data.shards (or with `pairs` data.pairs, whose
    samples must have captions), returns the index folder. Work for one rank; what is already there is kept. Raises
    InputError: no shard, no image, a changed shard.
    """
    data, cache = config.data, cache_dir(config)
    shards = data.pairs if pairs else data.shards
    if not shards:
        raise InputError("data.pairs names no text-image pairs: give tars, globs or folders")
    if shards == "shapes":
        number, seed = (
            (data.num_pairs, config.run.seed + 1000)
            if pairs
            else (data.num_images, config.run.seed)
        )
        folder = cache / f"shapes-{number}-seed{seed}"
        write_dataset(folder, num_images=number, seed=seed)
        shards = str(folder)
    rules = Rules(
        min_size_px=data.min_size_px,
        max_aspect=data.max_aspect,
        max_pixels=data.max_pixels,
        captions="required" if pairs else "optional",
    )
    index_dir = ensure_index(shards, cache / "index", rules=rules, progress=progress)
    if progress:
        for line in warnings_on(load(index_dir)):
            print(line, flush=True)
    return str(index_dir)


def open_source(config, ranks, mllm, vae, *, index_dir=None, pairs_dir=None):
    """The batches of a run (ImageSource), from step 0: images of index_dir, pairs of pairs_dir, or data.mix of both."""
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


def make_order(config, images, pairs, vae):
    """Shards of images and of pairs, one of them None where the run has none of the kind -> the plan (see samplers.FixedSizeSampler) of
    a run: squares or buckets, without the data.heldout samples of each kind that training never sees.
    """
    data, seed, batch = config.data, config.run.seed, config.train.global_batch

    def alone(shards, num):
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
        plan = alone(images, batch)
        if plan.total < batch:
            raise InputError(
                f"train.global_batch is {batch}, but there are only {plan.total} samples to train on: lower it or "
                "add data"
            )
        return plan
    num_images = num_images_per_batch(data.mix, batch) if images is not None else 0
    plans = alone(images, num_images), alone(pairs, batch - num_images)
    if data.buckets and all(plans):
        share_buckets(*plans)
    return MixtureSampler(seed, batch, num_images, *plans, len(images) if images is not None else 0)


def data_facts(shards):
    """What decides the order of a run's samples, by kind: [how many, CRC-32 of their records and of the sizes of shards]. Plain
    values for a checkpoint, which goes on with no others.
    """
    kinds = (
        {"images": shards.images, "pairs": shards.pairs}
        if isinstance(shards, Joined)
        else {"images": shards}
    )
    return {
        kind: [
            len(its),
            zlib.crc32(np.asarray(its.shard_sizes, "<i8").tobytes(), records_crc32(its.index)),
        ]
        for kind, its in kinds.items()
        if its is not None
    }


def share(rank=None, num_ranks=None):
    """-> (rank, number of ranks, device) of a process that works beside others without a connection: what is not given comes
    from the environment, as torchrun sets it. Raises InputError.
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


def write_latents(config, out, *, dtype, batch, rank=None, num_ranks=None):
    """Writes this rank's files of the latent cache of a run's images into `out`; returns a line that says so. Ranks need no
    connection.
    """
    rank, num_ranks, device = share(rank, num_ranks)
    positive("--batch", batch)
    shards = Shards(prepare_data(config, progress=rank == 0))
    # as training loads it, so that the latents are those that training would compute
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
    return f"rank {rank} of {num_ranks}: {num:,} of {len(shards):,} latents written to {out}; train with data.latents={out}"


def mllm_name(config):
    """Name of the MLLM to load: a hub id or a folder."""
    return shipped(config.model.mllm, shapes_mllm.WEIGHTS)


def shipped(name, folder):
    """`name`, or for "shapes" the folder of the weights that ship with the package. Raises InputError if they are damaged."""
    if name != "shapes":
        return name
    check_weights(folder)
    return str(folder)


def vae_name(config):
    """Name of the VAE to load: pixel:<patch>, random:<shape>, a hub id or a folder."""
    return shipped(config.model.vae, shapes_vae.WEIGHTS)


def foreign_data(config):
    """Return one sentence for each part that was trained on the shapes dataset but is about to see other data."""
    wanted = {"image": ("shards",), "pair": ("pairs",), "mix": ("shards", "pairs")}[
        config.train.data
    ]
    other = [f"data.{key}" for key in wanted if getattr(config.data, key) != "shapes"]
    shipped_parts = [part for part in ("vae", "mllm") if getattr(config.model, part) == "shapes"]
    advice = {"vae": "an AutoencoderKL trained on photographs", "mllm": "an InternVL checkpoint"}
    return [
        f"warning: model.{part}=shapes was trained on the shapes dataset alone, but {' and '.join(other)} is something "
        f"else: set model.{part} to {advice[part]}"
        for part in shipped_parts
        if other
    ]


def new_vae(config, device):
    """The frozen VAE of a run on `device`."""
    return load_vae(vae_name(config), patch=config.model.patch, dtype=config.dtype, device=device)


def make_recipe(config):
    """RunConfig -> Recipe."""
    return Recipe(
        seed=config.run.seed,
        mask=config.mask,
        adapter=config.adapter,
        time=asdict(config.time),
        sample_latents=config.model.vae_sample,
        caption_drop=config.train.caption_drop,
        noise_draws=config.train.noise_draws,
        align=config.align,
        align_share=config.align_share,
    )


def build_model(config, device):
    """Frozen parts on `device`, trained parts drawn from run.seed on the CPU -> IOMM."""
    mllm = load_mllm(
        mllm_name(config), revision=config.model.mllm_revision, dtype=config.dtype, device=device
    )
    return assemble(config, mllm, new_vae(config, device))


def assemble(config, mllm, vae, *, device=None):
    """Return the IOMM of a run around its frozen parts.

    device None: trained parts on the CPU, drawn from run.seed. Else on that device with weights that are still to be
    loaded, or on "meta" with none. Raises InputError if the VAE's patches do not divide data.size_px.
    """
    vae.grid(config.data.size_px, config.data.size_px)
    shape = generator_config(config.model.preset, token_dim=vae.token_dim, condition_dim=mllm.width)
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


def read_run(run_dir, ranks=None):
    """Run folder -> (its config, its newest intact checkpoint). Raises InputError when either is missing. With ranks: called on
    all of them, which check a share each and choose alike.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{run_dir} is not a run folder: no config.yaml in it; give the run.dir of a training run"
        )
    folder = checkpoint_reader.newest(Path(run_dir) / "checkpoints", ranks)
    if folder is None:
        raise InputError(
            f"{run_dir} has no intact checkpoint: train first, or wait for checkpoint.every_steps"
        )
    return load_config(str(path)), folder


def load_run(run_dir, *, weights="ema", device="cpu"):
    """Run folder -> (config, model with the weights of its newest intact checkpoint, not sharded; manifest). On a GPU the
    weights are in the run's precision, as training computes; on a CPU in float32.
    """
    config, folder = read_run(run_dir)
    model = build_model(config, device).to(device)
    # Only training needs it.
    model.alignment = None
    manifest = load_weights(model, folder, weights)
    if torch.device(device).type == "cuda" and config.dtype == torch.bfloat16:
        model.to(torch.bfloat16)
    return config, model, manifest


@torch.no_grad()
def load_weights(model, folder, weights="ema"):
    """Reads whole parameters of a checkpoint, of whatever number of ranks, into a model that is not sharded.

    weights: "ema", or "raw" for the fp32 masters; a run without an average has only these. An alignment head is read
    only where both have the same one, else the model's stays as it is: stages may differ in it.
    """
    reader = checkpoint_reader.Reader(folder)
    slot = "ema" if weights == "ema" and reader.manifest["ema"] else "master"
    parameters, shapes = dict(model.named_parameters()), reader.manifest["shapes"]
    wanted, found = set(without_head(parameters)), set(without_head(shapes))
    if wanted != found:
        raise InputError(
            f"{folder} is of another model: missing {sorted(wanted - found)[:3]}, unknown {sorted(found - wanted)[:3]}"
        )
    for name, parameter in parameters.items():
        if name in wanted or shapes.get(name) == list(parameter.shape):
            parameter.copy_(reader.full(slot, name))
    return reader.manifest


def without_head(by_name):
    """{parameter name: anything} -> the same without the alignment head's."""
    return {name: value for name, value in by_name.items() if not name.startswith(PREFIX)}
