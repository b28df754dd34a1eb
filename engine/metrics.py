"""What a run says of itself: log.jsonl, TensorBoard, the terminal. Telemetry never stops a run."""

import json
import resource
import time
from pathlib import Path

import torch

# Dense bf16 peak of one device, FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device):
    """Known bf16 peak of this device in FLOP/s, or None (every CPU, any other GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_gib(device):
    """Peak memory of this process so far in GiB: GPU memory allocated by torch, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Writes one record a step. Only rank 0 has one.

    mfu = FLOPs that the method needs for one image (IOMM.flops_per_image: recomputation and padding not counted)
    x images / s / (peak FLOP/s of one device x devices)."""

    def __init__(self, run_dir, *, flops_per_image, global_batch, num_steps, ranks, start_step=0, gpu_hours=0.0):
        self.dir = Path(run_dir)
        self.flops, self.global_batch, self.num_steps = flops_per_image, global_batch, num_steps
        self.size, self.device, self.peak = ranks.size, ranks.device, peak_flops(ranks.device)
        self.gpu_hours = gpu_hours
        self.recent = []
        self.trim(start_step)
        self.file = open(self.dir / "log.jsonl", "a", encoding="utf-8")
        self.board = self.open_board(start_step)
        self.clock = time.perf_counter()

    def trim(self, start_step):
        """Drops the lines of steps that a resumed run does again."""
        path = self.dir / "log.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    continue                     # the last line of a killed run may be cut
            partial = path.with_name(".log.jsonl.partial")      # a kill in here must not cost the lines before
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)

    def open_board(self, start_step):
        try:
            from torch.utils.tensorboard import SummaryWriter
            return SummaryWriter(self.dir / "tb", purge_step=start_step + 1)
        except Exception as error:
            print(f"no TensorBoard files: {error}", flush=True)
            return None

    def record(self, *, step, loss, by_time, grad_norm, lr, data_wait_s, skipped_steps, skipped_samples):
        """step counts from 1. by_time: loss sums, then counts, of equal intervals of t from image (0) to noise (1).
        Returns the record."""
        now = time.perf_counter()
        step_s, self.clock = now - self.clock, now
        self.recent = [*self.recent[-19:], step_s]
        images_per_s = self.global_batch / step_s
        self.gpu_hours += step_s * self.size / 3600
        typical_s = sorted(self.recent)[len(self.recent) // 2]
        row = {
            "step": step, "samples_seen": step * self.global_batch, "loss": loss,
            "loss_by_time": [total / count if count else None for total, count in zip(*halves(by_time))], "grad_norm": grad_norm, "lr": lr,
            "images_per_s": images_per_s,
            "mfu": self.flops * images_per_s / (self.peak * self.size) if self.peak else None,
            "data_wait_s": data_wait_s, "step_s": step_s, "memory_gib": memory_gib(self.device),
            "skipped_steps": skipped_steps, "skipped_samples": skipped_samples,
            "gpu_hours": self.gpu_hours, "gpu_hours_left": typical_s * (self.num_steps - step) * self.size / 3600,
        }
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if self.board is not None:
                flat = row | {f"loss_by_time/{i}": value for i, value in enumerate(row["loss_by_time"])}
                for key, value in flat.items():
                    if key not in ("step", "loss_by_time") and value is not None:
                        self.board.add_scalar(key, value, step)
        except OSError as error:
            print(f"step {step} not logged: {error}", flush=True)
        return row

    def image(self, tag, path, step):
        """Shows a PNG in TensorBoard."""
        if self.board is None:
            return
        import numpy as np
        from PIL import Image
        self.board.add_image(tag, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self):
        self.file.close()
        if self.board is not None:
            self.board.close()


def halves(values):
    """[a, b, c, d] -> [a, b], [c, d]."""
    return values[:len(values) // 2], values[len(values) // 2:]


def line(row, num_steps):
    """One record as the terminal shows it."""
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] is not None else ""
    norm = f"{row['grad_norm']:.3f}" if row["grad_norm"] is not None else "skipped"
    return (f"step {row['step']}/{num_steps}  loss {row['loss']:.4f}  grad norm {norm}  lr {row['lr']:.2e}  "
            f"{row['images_per_s']:.1f} images/s{mfu}  data wait {row['data_wait_s'] * 1e3:.0f} ms  "
            f"GPU-hours left {row['gpu_hours_left']:.2f}")
