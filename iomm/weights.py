"""Weights on disk: generators as diffusers' folders and back bit for bit, other parts as one safetensors file.

Only safetensors and JSON are read, so nothing is ever unpickled. diffusers itself is not needed here.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iomm.config import InputError
from iomm.generator import empty_generator
from iomm.layout import (
    TEXT_EMBEDDER,
    Layout,
    check_tensors,
    from_diffusers_config,
    to_diffusers_config,
)

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def export_generator(
    model, folder, *, patch=2, state=None, dtype=None, max_shard_bytes=MAX_SHARD_BYTES
):
    """Writes `model` as a folder for diffusers' from_pretrained: config.json and safetensors, sharded above 5 GB.

    `state`: another state dict of the same names, such as the EMA's. `dtype`: of the file, the weights' own by default.
    config.json goes last, so that a folder cut short by a kill is no model.
    """
    description = to_diffusers_config(model.config, patch)
    theirs = Layout(model.config, patch).to_theirs(model.state_dict() if state is None else state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / CONFIG, folder / INDEX, *folder.glob(f"{STEM}*.safetensors")):
        old.unlink(missing_ok=True)
    shards, room = [], 0
    for name in sorted(theirs):
        size = theirs[name].numel() * (dtype or theirs[name].dtype).itemsize
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = (
            f"{STEM}.safetensors"
            if len(shards) == 1
            else f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        write_tensors({name: theirs[name] for name in names}, folder / file, dtype)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in theirs.values())
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        )
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_generator(folder, *, device="cpu", dtype=None):
    """The generator in a diffusers folder, in eval mode; `dtype` is the file's by default.

    Raises InputError that says what is missing, unknown, damaged or of a shape that this engine does not have.
    """
    folder = Path(folder)
    config, patch = from_diffusers_config(read_json(folder / CONFIG), folder / CONFIG)
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        files = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
            raise InputError(f"{folder / INDEX} has no usable weight_map")
    else:
        files = [f"{STEM}.safetensors"]
    tensors, layout = {}, Layout(config, patch)
    for file in files:
        tensors |= read_tensors(folder / file)
    pooled = [name for name in tensors if name.startswith(TEXT_EMBEDDER)]
    layout_shapes = layout.shapes | {
        name: tuple(tensors[name].shape) for name in pooled if name in layout.shapes
    }
    check_tensors(
        folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, layout_shapes
    )
    if any(tensors[name].any() for name in pooled):
        raise InputError(
            f"{folder} uses a pooled text vector ({TEXT_EMBEDDER} is not zero); this engine has none"
        )
    model = empty_generator(
        config,
        device=device,
        dtype=dtype or tensors[layout.pieces["latents_in.weight"][0][0]].dtype,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(layout.to_ours(name, tensors.__getitem__))
    return model.eval()


def save_module(module, path, *, state=None, dtype=None):
    """Writes the state dict of any module (adapter, connector), or `state`, as one safetensors file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(module.state_dict() if state is None else state, Path(path), dtype)


@torch.no_grad()
def load_module(module, path):
    """Fills `module` from a file of save_module. Raises InputError that lists misfits; then nothing changes."""
    tensors, own = read_tensors(Path(path)), module.state_dict()
    check_tensors(
        path,
        *(
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (tensors, own)
        ),
    )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def write_tensors(tensors, path, dtype=None):
    """One safetensors file, complete or not there: written beside itself, then renamed. Tensors may share memory."""
    copies = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    part = path.with_name(path.name + ".part")
    save_file(copies, part, metadata={"format": "pt"})
    part.replace(path)


def read_tensors(path):
    """Name -> tensor of a safetensors file, on the CPU. Raises InputError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} as safetensors: {error}") from error


def read_json(path):
    """The JSON object in a file. Raises InputError if it is missing or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content
