"""Weights on disk: generators as diffusers folders, other modules as safetensors files.

A generator that is exported and loaded again is bitwise equal. Only safetensors and JSON are read,
so nothing is ever unpickled. This module does not import diffusers.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iomm.config import InputError
from iomm.generator import empty_generator
from iomm.layout import (
    TEXT_EMBEDDER,
    Layout,
    check_tensors,
    from_diffusers_config,
    to_diffusers_config,
)
from iomm.mmdit import MMDiT
from iomm.single_stream import SingleStream

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def export_generator(
    model: MMDiT | SingleStream,
    folder: Path | str,
    *,
    patch: int = 2,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a generator as a folder for diffusers' from_pretrained.

    The folder holds config.json and safetensors. config.json is written last, so a folder left
    incomplete by a kill is not a model.

    Args:
        model: the generator.
        folder: folder to write. An export that is already there is replaced.
        patch: the VAE's patch.
        state: a state dict to write instead of the model's, with the same names, e.g. the EMA's.
        dtype: dtype of the files. Defaults to that of the weights.
        max_shard_bytes: size above which the weights are split into several files.

    Raises:
        InputError: if diffusers does not support the shape, or `state` does not fit the model.
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


def load_generator(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MMDiT | SingleStream:
    """Load the generator in a diffusers folder, in eval mode.

    `dtype` defaults to that of the files.

    Raises:
        InputError: if something is missing, unknown, damaged or of an unsupported shape.
    """
    folder = Path(folder)
    config, patch = from_diffusers_config(read_json(folder / CONFIG), folder / CONFIG)
    tensors, layout = {}, Layout(config, patch)
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    pooled = [name for name in tensors if name.startswith(TEXT_EMBEDDER)]
    layout_shapes = layout.shapes | {
        name: tuple(tensors[name].shape) for name in pooled if name in layout.shapes
    }
    check_tensors(
        folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, layout_shapes
    )
    if any(tensors[name].any() for name in pooled):
        raise InputError(
            f"{folder} uses a pooled text vector ({TEXT_EMBEDDER} is not zero). "
            "Models with one are not supported."
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


class Initialization(NamedTuple):
    """What `initialize_generator` did."""

    # Parameters that have the folder's weights.
    taken: list[str]
    # Parameters that keep their fresh weights, each with the reason.
    fresh: dict[str, str]
    # Tensors of the folder for which the model has no parameter.
    unused: list[str]


@torch.no_grad()
def initialize_generator(
    model: MMDiT | SingleStream, folder: Path | str, *, patch: int
) -> Initialization:
    """Copy the weights of a diffusers transformer (see layout.py) into a generator where they fit.

    A parameter whose tensors are missing or of another shape keeps its weights; `condition_in`
    usually does, because it reads another encoder. FLUX's pooled text vector is taken as zero: what
    its embedder then adds to the time embedding is constant, and is added to the bias of `time_in`.
    A guidance embedder is not used.

    Args:
        model: the generator, with fresh weights.
        folder: folder with config.json and safetensors.
        patch: side of the patch of VAE latents that forms a token.

    Raises:
        InputError: if the folder is damaged, or has no weights for any block of the model.
    """
    folder, layout = Path(folder), Layout(model.config, patch)
    with contextlib.ExitStack() as files:
        source = {}
        for file in weight_files(folder):
            try:
                opened = files.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"cannot read {file} as safetensors: {error}") from error
            source |= dict.fromkeys(opened.keys(), opened)
        taken, fresh, used = [], {}, set()
        for name, parameter in model.named_parameters():
            reason = ""
            for theirs, rows in layout.pieces[name]:
                expected = (rows, *parameter.shape[1:])
                if theirs not in source:
                    reason = f"{theirs} is missing"
                    continue
                shape = tuple(source[theirs].get_slice(theirs).get_shape())
                # Of a piece with fewer rows in the model, the first ones are used.
                if shape[1:] != expected[1:] or shape[0] < rows:
                    reason = f"{theirs} has shape {shape}, expected {expected}"
            if reason:
                fresh[name] = reason
                continue
            tensor = layout.to_ours(name, lambda theirs: source[theirs].get_tensor(theirs))
            parameter.copy_(tensor)
            taken.append(name)
            used |= {theirs for theirs, _ in layout.pieces[name]}
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        blocks = ("blocks.", "single_blocks.")
        if not any(name.startswith(blocks) for name in matrices.intersection(taken)):
            raise InputError(
                f"{folder} has no weights for the blocks of this generator: "
                f"{next(reason for name, reason in fresh.items() if name in matrices)}. "
                "Set model.preset=from-init to use its shape."
            )
        embedder = [
            f"{TEXT_EMBEDDER}linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
        ]
        if "time_in.linear_out.bias" in taken and all(theirs in source for theirs in embedder):
            bias = model.time_in.linear_out.bias
            bias_1, weight_2, bias_2 = (
                source[theirs].get_tensor(theirs).to(bias) for theirs in embedder[1:]
            )
            bias += F.linear(F.silu(bias_1), weight_2, bias_2)
            used |= set(embedder)
        unused = sorted(set(source) - used - set(layout.fillers))
    return Initialization(taken, fresh, unused)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a diffusers folder.

    Raises:
        InputError: if its index is damaged.
    """
    if not (folder / INDEX).is_file():
        return [folder / f"{STEM}.safetensors"]
    weight_map = read_json(folder / INDEX).get("weight_map")
    files = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise InputError(f"{folder / INDEX} has no usable weight_map")
    return [folder / file for file in files]


def save_module(
    module: nn.Module,
    path: Path | str,
    *,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the state dict of a module, or `state`, as one safetensors file.

    The module is for example an adapter or a connector. `dtype` defaults to that of the weights.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(module.state_dict() if state is None else state, Path(path), dtype)


@torch.no_grad()
def load_module(module: nn.Module, path: Path | str) -> None:
    """Load a file written by `save_module` into `module`.

    Raises:
        InputError: with a list of the tensors that do not match. `module` is then unchanged.
    """
    tensors, own = read_tensors(Path(path)), module.state_dict()
    check_tensors(
        path,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in own.items()},
    )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None
) -> None:
    """Write one safetensors file atomically. Tensors may share memory.

    The tensors go to a temporary file in the same folder, which is then renamed.
    """
    copies = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    part = path.with_name(path.name + ".part")
    save_file(copies, part, metadata={"format": "pt"})
    part.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor} of a safetensors file, on the CPU.

    Raises:
        InputError: if the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} as safetensors: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: if the file is missing or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must contain a JSON object")
    return content
