"""Compare the loader with Pillow and torch's DataLoader.

    python benchmarks/loader.py                            drawn photographs, on this machine's
                                                           first two cores
    python benchmarks/loader.py --shards 'photos/*.tar'    your own photographs
    python benchmarks/loader.py --gpu                      decode on the GPU, and how much that
                                                           slows a training step

The pixels of both sides are compared first. Both sides convert each image to 512 px VAE pixels in
[-1, 1] and normalised 448 px ViT pixels, in float32 with antialiased cubic resizing. The DataLoader
has a process per core and reads the same tars by the same index. "ours" resizes with torch, as a
run on a CPU does by default; "ours_dali" resizes with DALI (data.resize=dali).

Figures are medians over rounds in which the sides take turns in one process, and are written to
benchmarks/results/loader-<device>-<date>.json. On a machine that is shared with other work (`load`)
images/s mean little, but CPU time per image over all threads and processes remains meaningful.
"""

import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from benchmarks.report import command
from iomm.engine.data.buckets import BucketSampler, bucket_sizes
from iomm.engine.data.index import build
from iomm.engine.data.samplers import EpochPermutation
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import RECORD
from iomm.engine.observe.doctor import machine
from iomm.kernels.image_patches import normalised
from iomm.mllm import IMAGE_MEAN, IMAGE_STD

SIZE_PX, VIT_PX, BATCH = 512, 448, 16
NUM_CORES, ROUNDS, BATCHES_A_ROUND, WARM_UP = 2, 5, 8, 4


class PillowDataset(torch.utils.data.Dataset):
    """The usual pipeline (open, convert, resize, crop, normalise), in the run's data order."""

    def __init__(self, index_dir: Path, order: Callable):
        self.index_dir, self.order, self.shards = index_dir, order, None

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        # Each worker process opens the shards itself.
        if self.shards is None:
            self.shards = Shards(self.index_dir)
        return decode_with_pillow(self.shards.image_bytes(int(self.order(n))))


def decode_with_pillow(data: bytes) -> tuple[Tensor, Tensor]:
    """Return the VAE pixels and the ViT pixels of an image file, (3, H, W) float32."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    scale = SIZE_PX / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = ((side - SIZE_PX) // 2 for side in image.size)
    image = image.crop((left, top, left + SIZE_PX, top + SIZE_PX))
    small = image.resize((VIT_PX, VIT_PX), Image.BICUBIC)
    return tensor(image, (0.5,) * 3, (0.5,) * 3), tensor(small, IMAGE_MEAN, IMAGE_STD)


def tensor(
    image: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """Convert an image to a normalised float32 tensor (3, H, W)."""
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous().float().div_(255)
    return x.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


def ours(
    index_dir: Path,
    device: str = "cpu",
    num_threads: int = NUM_CORES,
    dtype: torch.dtype = torch.float32,
    resize: str = "dali",
) -> ImageSource:
    """Return our loader, an endless source of batches."""
    return ImageSource(
        Shards(index_dir),
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        size_px=SIZE_PX,
        vit_px=VIT_PX,
        device=device,
        num_steps=1 << 30,
        num_threads=num_threads,
        dtype=dtype,
        resize=resize,
    )


def check(index_dir: Path, resize: str) -> list[float]:
    """Compare our pixels with Pillow's.

    Returns:
        For VAE and ViT pixels, the largest mean absolute difference of an image, in grey levels of
        255. They must be below 1.
    """
    shards, worst = Shards(index_dir), [0.0, 0.0]
    batches = iter(ours(index_dir, resize=resize))
    for batch in (next(batches) for _ in range(3)):
        vit_pixels_BCHW = normalised(batch.vit_pixels_BHWC, IMAGE_MEAN, IMAGE_STD)
        for k, pixels, vit_pixels in zip(
            batch.entry_B.tolist(), batch.pixels_BCHW, vit_pixels_BCHW, strict=True
        ):
            expected, vit_expected = decode_with_pillow(shards.image_bytes(k))
            std = torch.tensor(IMAGE_STD).view(3, 1, 1)
            worst[0] = max(worst[0], float((pixels - expected).abs().mean() * 127.5))
            worst[1] = max(worst[1], float(((vit_pixels - vit_expected) * std).abs().mean() * 255))
    batches.close()
    assert max(worst) < 1, (
        f"pixels differ from Pillow's by {worst} levels on average, so nothing is timed"
    )
    return worst


def images_per_s(batches: Iterator, num_batches: int) -> float:
    """Take this many batches and return the images/s."""
    started = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * BATCH / (time.perf_counter() - started)


def cpu_s() -> float:
    """Return the CPU time of this process and its living children in seconds."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def compare_with_pillow(index_dir: Path) -> dict:
    """Measure images/s and CPU time of all sides round by round, and their ratios.

    A side that is not being timed fills its queues and then idles, so each turn first takes WARM_UP
    batches that do not count.
    """
    shards = Shards(index_dir)
    loader = torch.utils.data.DataLoader(
        PillowDataset(index_dir, EpochPermutation(0, shards.shard_sizes)),
        batch_size=BATCH,
        num_workers=NUM_CORES,
        prefetch_factor=2,
    )
    sides = {
        "pillow": iter(loader),
        "ours": iter(ours(index_dir, resize="torch")),
        "ours_dali": iter(ours(index_dir)),
    }
    rate, cpu_ms = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, batches in sides.items():
            images_per_s(batches, WARM_UP)
            before = cpu_s()
            rate[name].append(images_per_s(batches, BATCHES_A_ROUND))
            cpu_ms[name].append(1e3 * (cpu_s() - before) / (BATCH * BATCHES_A_ROUND))
            # Let its queues fill before the next side is timed.
            time.sleep(1)
    for name in ("ours", "ours_dali"):
        sides[name].close()
    report = {"rounds": ROUNDS}
    for name in sides:
        report |= {
            f"{name}_images_per_s": statistics.median(rate[name]),
            f"{name}_cpu_ms_per_image": statistics.median(cpu_ms[name]),
        }
    for name in ("ours", "ours_dali"):
        for unit, found in (
            ("wall", [a / b for a, b in zip(rate[name], rate["pillow"], strict=True)]),
            ("cpu", [b / a for a, b in zip(cpu_ms[name], cpu_ms["pillow"], strict=True)]),
        ):
            report |= {
                f"{name}_{unit}_ratio": statistics.median(found),
                f"{name}_{unit}_ratio_range": [min(found), max(found)],
            }
    return report


def measure_reader(index_dir: Path) -> dict[str, float]:
    """Measure the CPU time of reading (pread, CRC-32).

    Returns ms per image, and the share of one core at 100 images/s.
    """
    shards, seconds = Shards(index_dir), []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for k in range(len(shards)):
            shards.decodable_bytes(k)
        seconds.append((time.thread_time() - started) / len(shards))
    return {
        "reader_ms_per_image": 1e3 * statistics.median(seconds),
        "reader_core_share_at_100_images_per_s": 100 * statistics.median(seconds),
    }


def measure_ten_million(index_dir: Path, folder: Path) -> dict[str, float]:
    """Measure opening an index of 10 M samples in 1,000 shards.

    Returns the size of the index, the seconds until the first batch, and the seconds until a plan
    of buckets. Nothing is open at the start of either time.
    """
    index = Shards(index_dir).index
    shard, records = (
        dict(index.shards[0]),
        np.asarray(index.records[: index.shards[0]["num_samples"]]),
    )
    header = json.loads((Path(index_dir) / "index.json").read_text())
    header |= {"num_samples": 10_000_000, "shards": []}
    for i in range(1000):
        link = folder / f"{i:04d}.tar"
        link.symlink_to(shard["path"])
        header["shards"].append(shard | {"path": str(link), "num_samples": 10_000})
    many = folder / "many"
    many.mkdir()
    (many / "index.json").write_text(json.dumps(header))
    block = records[np.arange(10_000) % len(records)].astype(RECORD).tobytes()
    with open(many / "index.bin", "wb") as f:
        for _ in range(1000):
            f.write(block)
    first, first_cpu, planned = [], [], []
    for _ in range(3):
        started, started_cpu = time.perf_counter(), time.process_time()
        batches = iter(ours(many))
        next(batches)
        first.append(time.perf_counter() - started)
        # Includes several batches that were prefetched.
        first_cpu.append(time.process_time() - started_cpu)
        batches.close()
        started = time.perf_counter()
        BucketSampler(0, Shards(many).index, 1024, bucket_sizes(SIZE_PX, 16))(
            np.arange(10**9, 10**9 + 1024)
        )
        planned.append(time.perf_counter() - started)
    num_bytes = sum(file.stat().st_size for file in many.iterdir())
    return {
        "index_mb_at_10m": num_bytes / 1e6,
        "first_batch_s_at_10m": statistics.median(first),
        "first_batch_cpu_s_at_10m": statistics.median(first_cpu),
        "bucket_plan_s_at_10m": statistics.median(planned),
    }


def measure_gpu(index_dir: Path) -> dict[str, float]:
    """Measure decoding on the GPU.

    Returns images/s, and how much slower matrix products run while 80 images/s are decoded.
    """
    batches = iter(ours(index_dir, "cuda", num_threads=8, dtype=torch.bfloat16))
    images_per_s(batches, 20)
    rate = statistics.median(images_per_s(batches, 40) for _ in range(ROUNDS))
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def products_s(decode: bool) -> float:
        torch.cuda.synchronize()
        started, num_taken = time.perf_counter(), 0
        for _ in range(400):
            x @ x
            while decode and num_taken * BATCH < 80 * (time.perf_counter() - started):
                next(batches)
                num_taken += 1
            torch.cuda.synchronize()
        return time.perf_counter() - started

    products_s(True)
    slower = statistics.median(products_s(True) / products_s(False) - 1 for _ in range(ROUNDS))
    batches.close()
    return {"gpu_images_per_s": rate, "gpu_time_taken_at_80_images_per_s": slower}


def draw_photographs(folder: Path, num: int = 128) -> Path:
    """Write two tars of JPEGs of 650 to 900 px into a new folder and return it.

    The images have soft shading, hard edges and grain, and about 100 KB each.
    """
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(num // 2):
                random = np.random.default_rng(1000 * shard + i)
                width, height = random.integers(650, 900, 2).tolist()
                pixels = np.asarray(
                    Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
                        (width, height), Image.BICUBIC
                    ),
                    dtype=np.float32,
                )
                y, x = np.mgrid[:height, :width]
                pixels[(x * 0.3 + y) % 90 < 30] *= 0.6
                grain = Image.fromarray(
                    random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                ).filter(ImageFilter.GaussianBlur(1))
                pixels += 0.3 * (np.asarray(grain, dtype=np.float32) - 128)
                out = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    out, "JPEG", quality=88, progressive=i % 6 == 0
                )
                info = tarfile.TarInfo(f"{i:06d}.jpg")
                info.size = len(out.getvalue())
                tar.addfile(info, io.BytesIO(out.getvalue()))
    return folder


def facts_of() -> dict:
    """Return the machine, versions and load that a time depends on."""
    return machine() | {"pillow": importlib.metadata.version("pillow"), "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", help="tars of photographs; default: drawn ones")
    parser.add_argument("--gpu", action="store_true", help="decode on the GPU")
    args = parser.parse_args()
    if not args.gpu:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    torch.set_num_threads(NUM_CORES)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shards = args.shards or draw_photographs(folder / "photos")
        index_dir = build(shards, folder / "index", progress=False)
        records = Shards(index_dir).index.records
        data = {
            "images": len(records),
            "kind": "photographs" if args.shards else "drawn",
            "mean_kb": float(records["image_bytes"].mean()) / 1e3,
            "median_px": [int(np.median(records["width"])), int(np.median(records["height"]))],
        }
        report = {
            "machine": facts_of(),
            "data": data,
            "size_px": SIZE_PX,
            "vit_px": VIT_PX,
            "batch": BATCH,
        }
        if args.gpu:
            report |= measure_gpu(index_dir)
        else:
            report["mean_difference_levels"] = {
                resize: check(index_dir, resize) for resize in ("dali", "torch")
            }
            report |= compare_with_pillow(index_dir)
            report |= measure_reader(index_dir)
            report |= measure_ten_million(index_dir, folder)
    device = "gpu" if args.gpu else "cpu"
    path = ROOT / f"benchmarks/results/loader-{device}-{report['machine']['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(command(main))
