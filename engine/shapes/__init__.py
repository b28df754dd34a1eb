"""The shapes dataset: rendered pictures with captions, a scorer for them, and the tiny MLLM and VAE that ship with the package."""

import hashlib
import json
from pathlib import Path

from iomm.config import InputError

WEIGHTS = Path(__file__).parent / "weights"
# {path below WEIGHTS: SHA-256} of the weight files, written by record_hashes
HASHES = WEIGHTS / "sha256.json"


def record_hashes() -> None:
    """Write HASHES. Call it after new weights were put in place: python -c "from iomm.engine import shapes; shapes.record_hashes()"."""
    files = sorted(WEIGHTS.rglob("*.safetensors"))
    HASHES.write_text(
        json.dumps({path.relative_to(WEIGHTS).as_posix(): sha256(path) for path in files}, indent=1)
        + "\n"
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_weights(folder: Path) -> None:
    """Raise InputError, naming the file, unless the weights directly in a shipped folder are those that were recorded."""
    for name, recorded in json.loads(HASHES.read_text()).items():
        path = WEIGHTS / name
        if path.parent != folder:
            continue
        if not path.is_file() or sha256(path) != recorded:
            problem = (
                "is damaged (its SHA-256 is not the recorded one)"
                if path.is_file()
                else "is missing"
            )
            raise InputError(
                f"the shipped weight file {path} {problem}: install iomm again, or restore it with `git checkout {path}`"
            )
