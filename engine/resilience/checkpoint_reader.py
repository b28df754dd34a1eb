"""Find, verify and read checkpoints, for any number of ranks and any ZeRO stage."""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iomm.config import InputError
from iomm.engine.resilience.rank_group import RankGroup

logger = logging.getLogger("iomm")

# Format 1 had equal pieces of the padded parameter in every file, and no "start/".
READABLE = (1, 2)
# The only file names that a manifest may contain, which prevents access outside its folder.
FILE_NAME = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def steps(root: Path | str) -> list[Path]:
    """Return the folders of all committed checkpoints, oldest first."""
    return sorted(
        (
            p
            for p in Path(root).glob("step-*")
            if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()
        ),
        key=step_of,
    )


def sha256(path: Path, from_disk: bool = False) -> str:
    """Return the SHA-256 of a file. `from_disk` bypasses the page cache."""
    with open(path, "rb") as file:
        # Drops the clean pages of an fsynced file, which makes the read reach the disk.
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the manifest as canonical JSON that includes its own hash."""
    text = json.dumps(manifest, sort_keys=True)
    return json.dumps(
        {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest}, sort_keys=True
    ).encode()


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        InputError: It is missing, or differs in any bit from what was written.
    """
    path = Path(folder) / "MANIFEST.json"
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)["manifest"]
        if (
            seal(manifest) != raw
            or manifest["format"] not in READABLE
            or not all(map(FILE_NAME.fullmatch, manifest["files"]))
        ):
            raise ValueError
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{folder} has no intact MANIFEST.json: it is not a checkpoint, or it is damaged"
        ) from None


def damage(
    folder: Path | str,
    manifest: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> str | None:
    """Return a one-line description of the first damage found in a checkpoint, or None.

    Args:
        folder: The checkpoint.
        manifest: Its manifest. Read from the folder by default.
        names: The files to hash. All by default.
    """
    folder = Path(folder)
    try:
        manifest = manifest or read_manifest(folder)
        if folder.name.startswith("step-") and folder.name != folder_name(manifest["step"]):
            return f"{folder} contains the checkpoint of step {manifest['step']}"
        extra = {p.name for p in folder.iterdir()} - {"MANIFEST.json", *manifest["files"]}
        if extra:
            return f"{folder / min(extra)} is not part of the checkpoint"
        for name in manifest["files"] if names is None else names:
            path, fact = folder / name, manifest["files"][name]
            if path.is_symlink() or not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != fact["bytes"] or sha256(path) != fact["sha256"]:
                return f"{path} differs from what was written (size or SHA-256)"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    return None


def verify(folder: Path | str, ranks: RankGroup) -> str | None:
    """Return a one-line description of damage to a checkpoint, or None.

    Call it on all ranks together, which return the same. Every rank must read the same manifest as
    rank 0, and hashes its share of the files. At the same world size this is the file that the rank
    wrote.
    """
    expected = ranks.on_first(lambda: manifest_hash(folder))
    problem = None
    try:
        manifest = read_manifest(folder)
        problem = damage(folder, manifest, sorted(manifest["files"])[ranks.rank :: ranks.size])
        if manifest_hash(folder) != expected:
            problem = f"rank {ranks.rank} reads a different {folder}/MANIFEST.json than rank 0"
    except InputError as error:
        problem = str(error)
    return next((p for p in ranks.all(problem) if p), None)


def manifest_hash(folder: Path | str) -> str | None:
    """Return the SHA-256 of a checkpoint's manifest, or None without one."""
    path = Path(folder) / "MANIFEST.json"
    return sha256(path) if path.is_file() else None


def newest(root: Path | str, ranks: RankGroup | None = None) -> Path | None:
    """Return the newest intact checkpoint below root, or None.

    Damaged checkpoints are logged and skipped. With `ranks`, call it on all ranks together: each
    hashes a share of the files, and all return the same checkpoint.
    """
    found = [str(p) for p in reversed(steps(root))]
    for folder in found if ranks is None else ranks.on_first(lambda: found):
        problem = damage(folder) if ranks is None else verify(folder, ranks)
        if problem is None:
            return Path(folder)
        if ranks is None or ranks.first:
            logger.warning("damaged checkpoint skipped: %s", problem)
    return None


class Reader:
    """Read parameters of an intact checkpoint, for any number of ranks and any ZeRO stage.

    Never unpickles.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.names = sorted(self.manifest["files"])
        # {rank: (open file, its keys)}
        self.files: dict[int, tuple[Any, set[str]]] = {}

    def file(self, rank: int) -> tuple[Any, set[str]]:
        """Return the open file of a rank and the set of its keys."""
        if rank not in self.files:
            try:
                file = safe_open(self.folder / self.names[rank], framework="pt")
            except SafetensorError as error:
                raise InputError(
                    f"{self.folder / self.names[rank]} is not a safetensors file: {error}"
                ) from None
            self.files[rank] = file, set(file.keys())
        return self.files[rank]

    def full(self, slot: str, name: str) -> Tensor:
        """Return a whole parameter in its own shape, fp32."""
        shape = self.manifest["shapes"][name]
        return self.piece(slot, name, 0, math.prod(shape)).view(shape)

    def piece(self, slot: str, name: str, start: int, numel: int, first: int = 0) -> Tensor:
        """Return values start ... start + numel - 1 of a flattened parameter, fp32, (numel,).

        Args:
            slot: "master", "ema" or a slot of the optimizer state.
            name: The parameter.
            start: Index of the first value.
            numel: Number of values.
            first: Rank whose file is searched first. At the same world size and stage, a rank's own
                file has all values.

        Raises:
            InputError: Some of the values are not in the checkpoint.
        """
        values, found = torch.empty(numel), 0
        for rank in (first + i for i in range(len(self.names))):
            if found == numel:
                break
            rank %= len(self.names)
            file, keys = self.file(rank)
            if f"{slot}/{name}" not in keys:
                continue
            stored = file.get_slice(f"{slot}/{name}")
            length = stored.get_shape()[0]
            at = int(file.get_tensor(f"start/{name}")) if f"start/{name}" in keys else rank * length
            low, high = max(start, at), min(start + numel, at + length)
            if low < high:
                values[low - start : high - start] = stored[low - at : high - at]
                found += high - low
        if found != numel:
            raise InputError(
                f"{self.folder} has only {found} of {numel} values of {slot}/{name}: "
                "the checkpoint is incomplete"
            )
        return values
