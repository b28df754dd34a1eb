"""Checkpoints: written beside, verified by hash, committed by one rename. Only safetensors and JSON.

    checkpoints/step-00000100/rank-00000-of-00002.safetensors   "master/<parameter>", "exp_avg/...", "ema/..." : pieces
    checkpoints/step-00000100/MANIFEST.json                     facts of the run, size and SHA-256 of every file

The newest folder whose manifest and files verify is the one to resume from; there is no pointer file to go stale."""

import hashlib
import json
import math
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from iomm.config import InputError

FORMAT = 1


def save(root, step, tensors, facts, ranks, keep):
    """Writes this rank's `tensors` and commits once every rank has written. Returns the folder, or None and leaves the
    older checkpoints alone when a rank could not write (disk full, say): rank 0 says why and training goes on."""
    root = Path(root)
    final = root / folder_name(step)

    def begin():
        try:
            root.mkdir(parents=True, exist_ok=True)
            sweep(root)
            folder = root / f".tmp-{step}-{uuid.uuid4().hex[:8]}"
            folder.mkdir()
            return str(folder)
        except OSError as error:
            print(f"checkpoint of step {step} not written: {error}; training goes on", flush=True)
    folder = ranks.on_first(begin)
    if folder is None:
        return None
    name = f"rank-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
    try:
        path = Path(folder) / name
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
        sync(path)
        outcome = (name, path.stat().st_size, sha256(path), None)
    except (OSError, SafetensorError) as error:
        outcome = (name, 0, "", str(error))
    outcomes = ranks.all(outcome)

    def commit():
        try:
            failed = [f"{name}: {error}" for name, _, _, error in outcomes if error]
            if failed:
                raise OSError("; ".join(failed))
            files = {name: {"bytes": size, "sha256": digest} for name, size, digest, _ in outcomes}
            manifest = Path(folder) / "MANIFEST.json"
            manifest.write_bytes(seal({"format": FORMAT, "step": step, "world_size": ranks.size, "files": files, **facts}))
            sync(manifest)
            sync(folder)
            if final.exists():
                discard(final)
            os.rename(folder, final)             # the only commit point
            sync(root)
            for old in steps(root)[:-keep]:
                discard(old)
            return str(final)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"checkpoint of step {step} not written: {error}; training goes on", flush=True)
    return ranks.on_first(commit)


def folder_name(step):
    return f"step-{step:08d}"


def steps(root):
    """Committed checkpoints, oldest first."""
    return sorted(p for p in Path(root).glob("step-*") if p.is_dir())


def sweep(root):
    """Removes what a killed save or a killed removal left."""
    for pattern in (".tmp-*", ".trash-*"):
        for left in Path(root).glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def discard(folder):
    trash = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest):
    """Manifest -> bytes: canonical JSON whose first entry is the hash of the rest."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}, sort_keys=True).encode()


def read_manifest(folder):
    """Folder -> manifest. Raises InputError if it is missing or one bit of it is not as written."""
    path = Path(folder) / "MANIFEST.json"
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)["manifest"]
        if seal(manifest) != raw or manifest["format"] != FORMAT:
            raise ValueError
        return manifest
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} holds no intact MANIFEST.json: not a checkpoint, or a damaged one") from None


def damage(folder, manifest, names=None):
    """What is wrong with these files (default: all) of a checkpoint, as one line, or None."""
    for name in manifest["files"] if names is None else names:
        path, fact = Path(folder) / name, manifest["files"][name]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != fact["bytes"] or sha256(path) != fact["sha256"]:
            return f"{path} is not as it was written"
    return None


def newest(root, say=print):
    """Newest intact checkpoint below root, or None. Damaged ones are named and passed over."""
    for folder in reversed(steps(root)):
        try:
            problem = damage(folder, read_manifest(folder))
        except InputError as error:
            problem = str(error)
        if problem is None:
            return folder
        say(f"checkpoint passed over: {problem}")
    return None


class Reader:
    """Reads parameters of an intact checkpoint back, for any number of ranks. Never unpickles."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.files = [safe_open(self.folder / name, framework="pt") for name in sorted(self.manifest["files"])]

    def full(self, slot, name):
        """Whole parameter, in its own shape."""
        shape = self.manifest["shapes"][name]
        flat = torch.cat([file.get_tensor(f"{slot}/{name}") for file in self.files])
        return flat[:math.prod(shape)].view(shape)

    def piece(self, slot, name, rank, size):
        """Rank's padded piece among `size` ranks."""
        if size == self.manifest["world_size"]:
            return self.files[rank].get_tensor(f"{slot}/{name}")
        flat = self.full(slot, name).flatten()
        numel = -(-len(flat) // size)
        return torch.nn.functional.pad(flat, (0, numel * size - len(flat)))[rank * numel:(rank + 1) * numel]
