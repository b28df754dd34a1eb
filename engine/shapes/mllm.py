"""The tiny MLLM of the shapes world: InternVL's architecture at 1 / 1000 of its size, weights random from a fixed seed."""

import shutil
from pathlib import Path

from iomm.engine.shapes.world import scene
from iomm.mllm import RECONSTRUCT, create_mllm

VISION = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=4,
              attention_bias=True)
TEXT = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512,
            max_position_embeddings=512)


def tiny_mllm(folder, seed=0):
    """Folder -> the same folder, holding the tiny MLLM in transformers' own format; made only if it is missing.

    32 px input, 16 image tokens, width 192."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        create_mllm(partial, texts=[RECONSTRUCT, *(scene(0, i).caption for i in range(1000))], vision=VISION, text=TEXT, seed=seed)
        partial.rename(folder)
    return folder
