"""Weights on disk: generators as diffusers folders, other modules as safetensors files.

A generator that is exported and loaded again is bitwise equal. Only safetensors and JSON are read,
so nothing is ever unpickled. This module does not import diffusers.

Files are memory-mapped, so the ranks of a machine read each one once and share its pages. Frozen
weights go from the map to their device one tensor at a time, and are cast there. On a CPU they are
the mapped pages themselves unless they are cast. The map is private: a write to a weight copies
its page and never reaches the file.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
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
# Floating-point dtypes by their names in safetensors files.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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

    `dtype` defaults to that of the files. Weights are placed as in `load_frozen`.

    Raises:
        InputError: if something is missing, unknown, damaged or of an unsupported shape.
    """
    folder = Path(folder)
    config, patch = from_diffusers_config(read_json(folder / CONFIG), folder / CONFIG)
    tensors, layout = read_folder(folder), Layout(config, patch)
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
    model = empty_generator(config, device="meta")
    load_frozen(
        model,
        functools.partial(layout.to_ours, read=tensors.__getitem__),
        device=device,
        dtype=dtype or tensors[layout.pieces["latents_in.weight"][0][0]].dtype,
    )
    return model.eval()


def load_frozen(
    module: nn.Module,
    read: Callable[[str], Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module on the meta device its weights, one tensor at a time.

    The host never holds more than one tensor that is neither mapped nor on its device. On a CPU, a
    tensor that `read` takes from a map stays mapped unless it is cast.

    Args:
        module: the module. Buffers that are not in its state dict are left as they are.
        read: returns the tensor of a name in the state dict, for example
            `read_folder(folder).__getitem__`.
        device: device of the weights.
        dtype: dtype of the floating-point weights. Defaults to that of each tensor.
    """
    state = {name: placed(read(name), device, dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)


def placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor on `device`, cast there to `dtype` if it is floating-point.

    The tensor itself is returned where nothing changes.
    """
    there = tensor.to(device)
    return there.to(dtype) if dtype is not None and there.is_floating_point() else there


def move_frozen(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move a module to `device`, one tensor at a time, and cast its state dict there.

    Use it on a module that was loaded in the dtype of its files (`stored_dtype`), whose weights are
    then still mapped. Buffers that are not in the state dict keep their dtype.
    """
    stored = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    # Module.to() would cast on the host, and the other buffers as well.
    module._apply(lambda tensor: placed(tensor, device, dtype if id(tensor) in stored else None))


def stored_dtype(
    name: Path | str, stem: str, *, revision: str | None = None, subfolder: str = ""
) -> torch.dtype | None:
    """Return the dtype in which a checkpoint can be loaded without a loss, mapped where possible.

    It is the dtype of the floating-point tensors, or the smallest one that represents all of them.
    Only the headers of the files are read; those of a hub checkpoint are downloaded if needed.

    Args:
        name: folder or hub id.
        stem: name of the weight files without number and suffix.
        revision: commit of the hub checkpoint.
        subfolder: folder of the files inside the hub checkpoint.

    Returns:
        The dtype, or None if the files cannot be read; loading them raises the reason.
    """
    try:
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            prefix = f"{subfolder}/" if subfolder else ""
            patterns = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
            folder = Path(
                snapshot_download(
                    str(name),
                    revision=revision,
                    allow_patterns=[f"{prefix}{stem}{pattern}" for pattern in patterns],
                )
            )
            folder /= subfolder
        found = set()
        for path in weight_files(folder, stem):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    found.add(FLOATS.get(file.get_slice(key).get_dtype()))
    # Of any kind: no network, no access, a damaged file, ...
    except Exception:
        return None
    found.discard(None)
    return functools.reduce(torch.promote_types, found) if found else None


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
    model: MMDiT | SingleStream,
    folder: Path | str,
    *,
    patch: int,
    copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
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
        copy: copies a tensor of the folder to a parameter.

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
            copy(parameter, tensor)
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
            # On the CPU, so that the result does not depend on the device.
            bias_1, weight_2, bias_2 = (
                source[theirs].get_tensor(theirs).to(bias.dtype) for theirs in embedder[1:]
            )
            bias += F.linear(F.silu(bias_1), weight_2, bias_2).to(bias.device)
            used |= set(embedder)
        unused = sorted(set(source) - used - set(layout.fillers))
    return Initialization(taken, fresh, unused)


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """Return the safetensors files of a diffusers or, with its stem, transformers folder.

    Raises:
        InputError: if its index is damaged.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    weight_map = read_json(index).get("weight_map")
    files = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise InputError(f"{index} has no usable weight_map")
    return [folder / file for file in files]


def read_folder(folder: Path | str, stem: str = STEM) -> dict[str, Tensor]:
    """Return {name: mapped tensor} of all safetensors files of a folder, sharded or not.

    Raises:
        InputError: if a file is missing or damaged.
    """
    tensors = {}
    for file in weight_files(Path(folder), stem):
        tensors |= read_tensors(file)
    return tensors


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
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file atomically. Tensors may share memory.

    The tensors go to a temporary file in the same folder, which is then renamed.
    """
    copies = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    part = path.with_name(path.name + ".part")
    try:
        save_file(copies, part, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        # A full disk, for example.
        part.unlink(missing_ok=True)
        raise OSError(f"{part} cannot be written: {error}") from error
    part.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor} of a safetensors file, mapped into memory.

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
