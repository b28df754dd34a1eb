"""Checkpoints read back: the newest intact one, verified by hash, for any number of ranks and any ZeRO stage."""

import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from iomm.config import InputError

# 1 had equal pieces of the padded parameter in every file, and no "start/"
READABLE = (1, 2)
# A manifest may name nothing else: no way out of its folder.
FILE_NAME = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")


def folder_name(step):
    return f"step-{step:08d}"


def step_of(folder):
    return int(folder.name.removeprefix("step-"))


def steps(root):
    """Committed checkpoints, oldest first."""
    return sorted(
        (
            p
            for p in Path(root).glob("step-*")
            if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()
        ),
        key=step_of,
    )


def sha256(path, from_disk=False):
    with open(path, "rb") as file:
        # Drops the clean pages of an fsynced file, so that the disk is asked.
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest):
    """Manifest -> bytes: canonical JSON whose first entry is the hash of the rest."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps(
        {"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}, sort_keys=True
    ).encode()


def read_manifest(folder):
    """Folder -> manifest. Raises InputError if it is missing or one bit of it is not as written."""
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
            f"{folder} holds no intact MANIFEST.json: not a checkpoint, or a damaged one"
        ) from None


def damage(folder, manifest=None, names=None):
    """What is wrong with these files (default: all) of a checkpoint, as one line, or None."""
    folder = Path(folder)
    try:
        manifest = manifest or read_manifest(folder)
        if folder.name.startswith("step-") and folder.name != folder_name(manifest["step"]):
            return f"{folder} holds the checkpoint of step {manifest['step']}"
        extra = {p.name for p in folder.iterdir()} - {"MANIFEST.json", *manifest["files"]}
        if extra:
            return f"{folder / min(extra)} does not belong there"
        for name in manifest["files"] if names is None else names:
            path, fact = folder / name, manifest["files"][name]
            if path.is_symlink() or not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != fact["bytes"] or sha256(path) != fact["sha256"]:
                return f"{path} is not as it was written"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    return None


def verify(folder, ranks):
    """What is wrong with a checkpoint, as one line that is the same on every rank, or None.

    Every rank must see the manifest that rank 0 sees, and hashes its share of the files: its own at the same world size.
    """
    seen = ranks.on_first(lambda: manifest_hash(folder))
    problem = None
    try:
        manifest = read_manifest(folder)
        problem = damage(folder, manifest, sorted(manifest["files"])[ranks.rank :: ranks.size])
        if manifest_hash(folder) != seen:
            problem = f"rank {ranks.rank} sees another {folder}/MANIFEST.json than rank 0"
    except InputError as error:
        problem = str(error)
    return next((p for p in ranks.all(problem) if p), None)


def manifest_hash(folder):
    path = Path(folder) / "MANIFEST.json"
    return sha256(path) if path.is_file() else None


def newest(root, ranks=None, say=print):
    """Newest intact checkpoint below root, or None; damaged ones are named and passed over. With ranks: called on all of
    them, which read a share each and decide alike.
    """
    found = [str(p) for p in reversed(steps(root))]
    for folder in found if ranks is None else ranks.on_first(lambda: found):
        problem = damage(folder) if ranks is None else verify(folder, ranks)
        if problem is None:
            return Path(folder)
        if ranks is None or ranks.first:
            say(f"checkpoint passed over: {problem}")
    return None


class Reader:
    """Reads parameters of an intact checkpoint back, for any number of ranks and any ZeRO stage. Never unpickles."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.names, self.files = sorted(self.manifest["files"]), {}

    def file(self, rank):
        """One rank's open file and the set of its keys."""
        if rank not in self.files:
            try:
                file = safe_open(self.folder / self.names[rank], framework="pt")
            except SafetensorError as error:
                raise InputError(
                    f"{self.folder / self.names[rank]} is not safetensors: {error}"
                ) from None
            self.files[rank] = file, set(file.keys())
        return self.files[rank]

    def full(self, slot, name):
        """Whole parameter, in its own shape."""
        shape = self.manifest["shapes"][name]
        return self.piece(slot, name, 0, math.prod(shape)).view(shape)

    def piece(self, slot, name, start, numel, first=0):
        """Values start ... start + numel - 1 of a flattened parameter, fp32, from the files that hold them. Rank `first`'s file
        is looked into first: at the same world size and stage it has them all.
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
                f"{self.folder} holds {found} of {numel} values of {slot}/{name}: written by something else?"
            )
        return values
