"""RunConfig -> the parts of a run: data, frozen models, trained model. Shared by training and by the console command."""

from dataclasses import asdict
from pathlib import Path

import torch

from iomm.adapter import Connector, QueryAdapter
from iomm.config import InputError, generator_config
from iomm.engine import checkpoint
from iomm.engine.config import load_config
from iomm.engine.data.index import ensure_index
from iomm.engine.shapes.mllm import tiny_mllm
from iomm.engine.shapes.world import write_world
from iomm.generator import new_generator
from iomm.mllm import load_mllm
from iomm.model import IOMM, Recipe
from iomm.vae import load_vae


def cache_dir(config):
    """What runs share lies beside them: the shapes world, its MLLM, indexes."""
    return Path(config.run.dir).parent / "shared"


def prepare_data(config, progress=True):
    """Draws the shapes world if that is what is trained on, indexes the shards, returns the index folder. Work for one
    rank; what is already there is kept. Raises InputError: no shard, no image, a changed shard."""
    shards, cache = config.data.shards, cache_dir(config)
    if shards == "shapes":
        folder = cache / f"shapes-{config.data.num_images}-seed{config.run.seed}"
        write_world(folder, num_images=config.data.num_images, seed=config.run.seed)
        shards = str(folder)
    return str(ensure_index(shards, cache / "index", progress=progress))


def prepare_mllm(config):
    """Name of the MLLM to load; makes the tiny one of the shapes world if that is the one. Work for one rank."""
    if config.model.mllm != "shapes":
        return config.model.mllm
    return str(tiny_mllm(cache_dir(config) / "shapes-mllm"))


def build_model(config, mllm_name, device):
    """Frozen parts on `device`, trained parts drawn from run.seed on the CPU -> IOMM."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    mllm = load_mllm(mllm_name, revision=config.model.mllm_revision, dtype=dtype, device=device)
    vae = load_vae(config.model.vae, dtype=dtype, device=device)
    vae.grid(config.data.size_px, config.data.size_px)          # raises if the size does not divide
    shape = generator_config(config.model.preset, token_dim=vae.token_dim, condition_dim=mllm.width)
    recipe = Recipe(seed=config.run.seed, mask=config.mask, adapter=config.adapter, time=asdict(config.time),
                    sample_latents=config.model.vae_sample)
    seed, adapter, connector = config.run.seed, None, None
    if config.adapter.kind != "none":
        adapter = QueryAdapter(config.adapter, mllm.width)
        adapter.init_weights(seed)
    if config.adapter.connector_layers:
        connector = Connector(config.adapter, mllm.width)
        connector.init_weights(seed)
    return IOMM(new_generator(shape, seed), adapter, mllm, vae, recipe, connector)


def read_run(run_dir):
    """Run folder -> (its config, its newest intact checkpoint). Raises InputError when either is missing."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: no config.yaml in it; give the run.dir of a training run")
    folder = checkpoint.newest(Path(run_dir) / "checkpoints")
    if folder is None:
        raise InputError(f"{run_dir} has no intact checkpoint: train first, or wait for checkpoint.every_steps")
    return load_config(str(path)), folder


def load_run(run_dir, *, weights="ema", device="cpu"):
    """Run folder -> (config, model with the weights of its newest intact checkpoint, not sharded; manifest)."""
    config, folder = read_run(run_dir)
    model = build_model(config, prepare_mllm(config), device).to(device)
    return config, model, load_weights(model, folder, weights)


@torch.no_grad()
def load_weights(model, folder, weights="ema"):
    """Reads whole parameters of a checkpoint, of whatever number of ranks, into a model that is not sharded.

    weights: "ema", or "raw" for the fp32 masters; a run without an average has only these."""
    reader = checkpoint.Reader(folder)
    slot = "ema" if weights == "ema" and reader.manifest["ema"] else "master"
    parameters = dict(model.named_parameters())
    wanted, found = set(parameters), set(reader.manifest["shapes"])
    if wanted != found:
        raise InputError(f"{folder} is of another model: missing {sorted(wanted - found)[:3]}, unknown {sorted(found - wanted)[:3]}")
    for name, parameter in parameters.items():
        parameter.copy_(reader.full(slot, name))
    return reader.manifest
