"""The tiny VAE of the shapes dataset: an AutoencoderKL with FLUX's layout (no quant convolutions), 0.7 M parameters.

It maps pictures of 64 px to 8 x 8 latents of 4 channels, which the default run learns to generate. model.vae=shapes is the
one in WEIGHTS; the header of its safetensors file holds its reconstruction accuracy and the settings it was trained with.
This command made it, and makes another for model.vae=FOLDER:

    python -m iomm.engine.shapes.vae --out FOLDER
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iomm.config import InputError
from iomm.engine.shapes.dataset import VERSION, draw, scene
from iomm.engine.shapes.scorer import score
from iomm.vae import FluxVAE, load_vae, new_autoencoder

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
# Of the mean absolute error, beside the mean squared error of pixels in [-1, 1]
L1_WEIGHT = 0.1
EMA_DECAY = 0.998
# Images whose latents give scale and shift.
NUM_STATISTICS = 2000


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One run of the optimizer over `steps` batches, from `lr` down a half cosine to 0.

    kl_weight: of the KL divergence in nats per image, beside the mean squared error of pixels.
    """

    steps: int
    lr: float
    kl_weight: float
    batch: int = 32
    num_images: int = 16000
    seed: int = 0


# The second leg drops what a picture can spare, mostly its noise: 450 nats become 250, and the generator learns faster.
LEGS = (Leg(steps=4000, lr=2e-3, kl_weight=2e-6), Leg(steps=800, lr=1e-3, kl_weight=1e-5, seed=1))


def render(seed: int, numbers: range, split: str = "train") -> torch.Tensor:
    """Return scenes as uint8 pixels (N, 3, SIZE_PX, SIZE_PX)."""
    pictures = [np.asarray(draw(scene(seed, i, split), SIZE_PX)) for i in numbers]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def normalised(bytes_BCHW: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels as float32 in [-1, 1], channels last."""
    return (bytes_BCHW.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def turned(x_BCHW: torch.Tensor, number: int) -> torch.Tensor:
    """Apply one of the eight symmetries of the square, `number` 0 to 7."""
    x_BCHW = torch.rot90(x_BCHW, number % 4, (2, 3))
    return x_BCHW.flip(3) if number >= 4 else x_BCHW


def vae_loss(
    autoencoder, pixels_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, turn: int, kl_weight: float
) -> torch.Tensor:
    """Return squared + absolute error + KL divergence (Kingma and Welling, arXiv 1312.6114, appendix B), a scalar.

    The latents are turned before they are decoded, and compared with pixels turned alike: latents that turn with the
    picture are easier to generate (EQ-VAE, arXiv 2502.09509).
    """
    mean_BCHW, logvar_BCHW = autoencoder.encoder(pixels_BCHW).chunk(2, dim=1)
    nats = 0.5 * (mean_BCHW.square() + logvar_BCHW.exp() - 1 - logvar_BCHW).sum((1, 2, 3)).mean()
    latents_BCHW = mean_BCHW + torch.exp(0.5 * logvar_BCHW) * noise_BCHW
    decoded = autoencoder.decoder(
        turned(latents_BCHW, turn).contiguous(memory_format=torch.channels_last)
    )
    target = turned(pixels_BCHW, turn)
    return F.mse_loss(decoded, target) + L1_WEIGHT * F.l1_loss(decoded, target) + kl_weight * nats


def train(out, legs=LEGS, *, num_scored: int = 1000, report=print) -> dict:
    """Train from scratch, leg after leg, and write the folder `out`. Return the reconstruction accuracies by split.

    Each leg starts from the folder that the one before it wrote, so a command that was killed continues with the leg it was
    in. A pure function of the legs on one machine kind and number of threads. Raises InputError if `out` holds other legs.
    """
    out = Path(out)
    done = json.loads(metadata(out)["legs"]) if (out / FILE).is_file() else []
    for leg, there in zip(legs, done):
        if different := {key for key, value in asdict(leg).items() if there.get(key) != value}:
            raise InputError(
                f"{out} was trained with another {', '.join(sorted(different))}: give another folder, or remove it"
            )
    for number in range(len(done), len(legs)):
        done.append(train_leg(out, legs[number], done, report))
    vae = load_vae(str(out))
    found = {
        split: round(reconstruction_accuracy(vae, num_scored, split), 4)
        for split in ("train", "test")
    }
    write_metadata(out, legs=json.dumps(done), accuracy=json.dumps(found))
    return found


def train_leg(out: Path, leg: Leg, done: list, report) -> dict:
    """Run one leg, write `out`, and return what its header keeps of the leg. done: the legs before it; without any the
    weights are drawn from the seed.
    """
    begun = time.monotonic()
    generator = torch.Generator().manual_seed(leg.seed)
    images_NCHW = render(0, range(leg.num_images))
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
        turns = torch.randint(0, 8, (2,), generator=generator).tolist()
        pixels_BCHW = turned(normalised(images_NCHW[numbers]), turns[0]).contiguous(
            memory_format=torch.channels_last
        )
        noise_BCHW = torch.randn(
            leg.batch, ARCHITECTURE["latent_channels"], side, side, generator=generator
        )
        loss = vae_loss(
            autoencoder, pixels_BCHW, noise_BCHW, turns[1] if step % 2 else 0, leg.kl_weight
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in autoencoder.named_parameters():
                averaged[name].lerp_(p, 1 - min(EMA_DECAY, 1 - 1 / (step + 1)))
        if step % 50 == 0 or step == leg.steps - 1:
            report(
                f"leg {len(done) + 1}  step {step}/{leg.steps}  loss {loss.item():.4f}  {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    autoencoder.load_state_dict(averaged)
    facts = asdict(leg) | {
        "l1_weight": L1_WEIGHT,
        "dataset": VERSION,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - begun),
    }
    save(autoencoder.eval(), out, images_NCHW[:NUM_STATISTICS])
    write_metadata(out, legs=json.dumps([*done, facts]))
    return facts


def metadata(folder) -> dict:
    """Return {name: text} of the header of a folder's weights."""
    with safe_open(Path(folder) / FILE, framework="pt") as file:
        return file.metadata()


def write_metadata(folder, **texts: str) -> None:
    path = Path(folder) / FILE
    save_file(load_file(path), path, {"format": "pt", **texts})


@torch.no_grad()
def save(autoencoder, out, images_NCHW: torch.Tensor) -> None:
    """Write an AutoencoderKL folder in bfloat16. Scale and shift make the latents of these images mean 0, variance 1."""
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
    """Return the share of pictures, none of them trained on, that still fit their caption when encoded and decoded."""
    right = 0
    for first in range(0, num, 100):
        numbers = range(first, min(first + 100, num))
        pixels_BCHW = vae.decode(vae.encode(normalised(render(seed, numbers, split))))
        bytes_BHWC = (
            ((pixels_BCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        )
        right += sum(
            score(pixels, scene(seed, i, split).caption)["fits"]
            for i, pixels in zip(numbers, bytes_BHWC)
        )
    return right / num


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="folder of the weights; an interrupted one is continued"
    )
    print(train(parser.parse_args().out))
