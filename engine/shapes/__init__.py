"""The shapes dataset: rendered captioned pictures, their scorer, and a tiny MLLM and VAE.

The weights of the two models ship with the package.
"""

import hashlib
import json
from pathlib import Path

from iomm.config import InputError

WEIGHTS = Path(__file__).parent / "weights"
# {path below WEIGHTS: SHA-256} of the weight files, written by record_hashes.
HASHES = WEIGHTS / "sha256.json"


def record_hashes() -> None:
    """Write HASHES. Call it after replacing shipped weights.

    python -c "from iomm.engine import shapes; shapes.record_hashes()"
    """
    files = sorted(WEIGHTS.rglob("*.safetensors"))
    hashes = {path.relative_to(WEIGHTS).as_posix(): sha256(path) for path in files}
    HASHES.write_text(json.dumps(hashes, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hex string."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_weights(folder: Path) -> None:
    """Check the weight files directly inside a shipped folder against their recorded hashes.

    Raises:
        InputError: if a file is missing or its hash differs. The message names the file.
    """
    for name, recorded in json.loads(HASHES.read_text()).items():
        path = WEIGHTS / name
        if path.parent != folder:
            continue
        if not path.is_file():
            problem = "is missing"
        elif sha256(path) != recorded:
            problem = "is damaged (its SHA-256 differs from the recorded one)"
        else:
            continue
        raise InputError(
            f"the shipped weight file {path} {problem}. Reinstall iomm, or restore the file with "
            f"`git checkout {path}`."
        )
