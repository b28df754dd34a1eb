"""The tiny VAE of the shapes dataset: an AutoencoderKL in FLUX's layout, 0.7 M parameters.

Like FLUX's it has no quant convolutions. It maps pictures of 64 px to 8 x 8 latents of 4 channels,
which the default run learns to generate. model.vae=shapes selects the one in WEIGHTS. The header of
its safetensors file holds its reconstruction accuracy and training settings. It was made by this
command, which trains another one for use as model.vae=FOLDER:

    python -m iomm.engine.shapes.vae --out FOLDER
"""

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iomm.config import InputError
from iomm.engine.shapes.dataset import VERSION, render, scene
from iomm.engine.shapes.scorer import score
from iomm.vae import FluxVAE, load_vae, new_autoencoder

logger = logging.getLogger("iomm")

WEIGHTS = Path(__file__).parent / "weights" / "vae"
FILE = "diffusion_pytorch_model.safetensors"
SIZE_PX = 64
ARCHITECTURE = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(8, 16, 32, 64),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=4,
    act_fn="silu",
    sample_size=SIZE_PX,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
# Weight of the mean absolute error relative to the mean squared error, for pixels in [-1, 1].
L1_WEIGHT = 0.1
EMA_DECAY = 0.998
# Images from whose latents the scale and shift are computed.
NUM_STATISTICS = 2000


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One part of the training schedule: `steps` batches with one optimizer.

    The learning rate falls from `lr` to 0 along half a cosine. `kl_weight` is the weight of the KL
    divergence, in nats per image, relative to the mean squared error of the pixels.
    """

    steps: int
    lr: float
    kl_weight: float
    batch: int = 32
    num_images: int = 16000
    seed: int = 0


# The second leg removes information that a picture can do without, mostly its noise. It lowers the
# KL divergence from 450 to 250 nats, and the generator learns faster.
LEGS = (Leg(steps=4000, lr=2e-3, kl_weight=2e-6), Leg(steps=800, lr=1e-3, kl_weight=1e-5, seed=1))


def render_batch(seed: int, numbers: range, split: str = "train") -> Tensor:
    """Return scenes as uint8 pixels (N, 3, SIZE_PX, SIZE_PX)."""
    pictures = [np.asarray(render(scene(seed, i, split), SIZE_PX)) for i in numbers]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def normalised(bytes_BCHW: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1], channels last."""
    return (bytes_BCHW.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def transformed(x_BCHW: Tensor, number: int) -> Tensor:
    """Apply one of the eight symmetries of the square, `number` 0 to 7, with 0 the identity."""
    x_BCHW = torch.rot90(x_BCHW, number % 4, (2, 3))
    return x_BCHW.flip(3) if number >= 4 else x_BCHW


def vae_loss(
    autoencoder: nn.Module,
    pixels_BCHW: Tensor,
    noise_BCHW: Tensor,
    symmetry: int,
    kl_weight: float,
) -> Tensor:
    """Return squared error + absolute error + KL divergence, a scalar.

    The KL divergence is that of Kingma and Welling (arXiv 1312.6114, appendix B). The latents are
    transformed by a symmetry of the square before decoding, and compared with the pixels
    transformed in the same way. Latents that rotate with the picture are easier to generate
    (EQ-VAE, arXiv 2502.09509).

    Args:
        autoencoder: an AutoencoderKL.
        pixels_BCHW: pictures in [-1, 1].
        noise_BCHW: standard normal noise in the shape of the latents.
        symmetry: number of the symmetry, see transformed.
        kl_weight: weight of the KL divergence, which is in nats per image.
    """
    mean_BCHW, logvar_BCHW = autoencoder.encoder(pixels_BCHW).chunk(2, dim=1)
    nats = 0.5 * (mean_BCHW.square() + logvar_BCHW.exp() - 1 - logvar_BCHW).sum((1, 2, 3)).mean()
    latents_BCHW = mean_BCHW + torch.exp(0.5 * logvar_BCHW) * noise_BCHW
    decoded_BCHW = autoencoder.decoder(
        transformed(latents_BCHW, symmetry).contiguous(memory_format=torch.channels_last)
    )
    target_BCHW = transformed(pixels_BCHW, symmetry)
    squared = F.mse_loss(decoded_BCHW, target_BCHW)
    return squared + L1_WEIGHT * F.l1_loss(decoded_BCHW, target_BCHW) + kl_weight * nats


def train(
    out: str | Path, legs: Sequence[Leg] = LEGS, *, num_scored: int = 1000
) -> dict[str, float]:
    """Train from scratch, leg by leg, and return the reconstruction accuracies by split.

    Each leg writes the folder `out`, and the next one starts from it. A killed command that is
    started again therefore repeats only the leg that it was in. The weights are a pure function of
    the legs on one kind of machine and number of threads.

    Args:
        out: folder of the weights.
        legs: the schedule.
        num_scored: pictures per split on which the accuracies are measured.

    Raises:
        InputError: if `out` was trained with other legs.
    """
    out = Path(out)
    done = json.loads(metadata(out)["legs"]) if (out / FILE).is_file() else []
    for leg, recorded in zip(legs, done, strict=False):
        if different := {key for key, value in asdict(leg).items() if recorded.get(key) != value}:
            raise InputError(
                f"{out} was trained with another {', '.join(sorted(different))}. "
                "Give another folder, or remove it."
            )
    for number in range(len(done), len(legs)):
        done.append(train_leg(out, legs[number], done))
    vae = load_vae(str(out))
    found = {
        split: round(reconstruction_accuracy(vae, num_scored, split), 4)
        for split in ("train", "test")
    }
    write_metadata(out, legs=json.dumps(done), accuracy=json.dumps(found))
    return found


def train_leg(out: Path, leg: Leg, done: list[dict]) -> dict:
    """Run one leg, write `out`, and return the leg's entry for the header.

    done: entries of the legs before it. Without any, the weights are initialized from the leg's
        seed.
    """
    begun = time.monotonic()
    generator = torch.Generator().manual_seed(leg.seed)
    images_NCHW = render_batch(0, range(leg.num_images))
    if done:
        autoencoder = load_vae(str(out)).backbone.train().requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(leg.seed)
            autoencoder = new_autoencoder(ARCHITECTURE)
    autoencoder.to(torch.float32, memory_format=torch.channels_last)
    averaged = {name: p.detach().clone() for name, p in autoencoder.named_parameters()}
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=leg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    side = SIZE_PX // 2 ** (len(ARCHITECTURE["block_out_channels"]) - 1)
    for step in range(leg.steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                leg.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / leg.steps))
            )
        numbers = torch.randint(0, leg.num_images, (leg.batch,), generator=generator)
        symmetries = torch.randint(0, 8, (2,), generator=generator).tolist()
        pixels_BCHW = transformed(normalised(images_NCHW[numbers]), symmetries[0]).contiguous(
            memory_format=torch.channels_last
        )
        noise_BCHW = torch.randn(
            leg.batch, ARCHITECTURE["latent_channels"], side, side, generator=generator
        )
        loss = vae_loss(
            autoencoder, pixels_BCHW, noise_BCHW, symmetries[1] if step % 2 else 0, leg.kl_weight
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in autoencoder.named_parameters():
                averaged[name].lerp_(p, 1 - min(EMA_DECAY, 1 - 1 / (step + 1)))
        if step % 50 == 0 or step == leg.steps - 1:
            logger.info(
                f"leg {len(done) + 1}  step {step}/{leg.steps}  loss {loss.item():.4f}  "
                f"{time.monotonic() - begun:.0f} s"
            )
    autoencoder.load_state_dict(averaged)
    entry = asdict(leg) | {
        "l1_weight": L1_WEIGHT,
        "dataset": VERSION,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - begun),
    }
    save(autoencoder.eval(), out, images_NCHW[:NUM_STATISTICS])
    write_metadata(out, legs=json.dumps([*done, entry]))
    return entry


def metadata(folder: str | Path) -> dict[str, str]:
    """Return the metadata in the header of a folder's weight file."""
    with safe_open(Path(folder) / FILE, framework="pt") as file:
        return file.metadata()


def write_metadata(folder: str | Path, **texts: str) -> None:
    """Replace the metadata in the header of a folder's weight file."""
    path = Path(folder) / FILE
    save_file(load_file(path), path, {"format": "pt", **texts})


@torch.no_grad()
def save(autoencoder: nn.Module, out: str | Path, images_NCHW: Tensor) -> None:
    """Write an AutoencoderKL folder in bfloat16.

    Its scale and shift give the latents of these uint8 images mean 0 and variance 1.
    """
    means = [
        autoencoder.encode(normalised(part)).latent_dist.mean for part in images_NCHW.split(100)
    ]
    latents = torch.cat(means).double()
    autoencoder.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    shutil.rmtree(out, ignore_errors=True)
    autoencoder.to(torch.bfloat16).save_pretrained(out)


@torch.no_grad()
def reconstruction_accuracy(
    vae: FluxVAE, num: int, split: str = "train", seed: int = 2**31
) -> float:
    """Return the share of pictures that fit their caption after encoding and decoding.

    The default seed is not used in training, so none of the pictures were trained on.
    """
    right = 0
    for first in range(0, num, 100):
        numbers = range(first, min(first + 100, num))
        pixels_BCHW = vae.decode(vae.encode(normalised(render_batch(seed, numbers, split))))
        bytes_BHWC = (
            ((pixels_BCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        )
        right += sum(
            score(pixels, scene(seed, i, split).caption)["fits"]
            for i, pixels in zip(numbers, bytes_BHWC, strict=True)
        )
    return right / num


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="folder of the weights; an interrupted run resumes"
    )
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    print(train(parser.parse_args().out))
