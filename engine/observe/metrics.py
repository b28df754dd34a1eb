"""What a run says of itself: log.jsonl, TensorBoard, the terminal, and wandb if asked. Telemetry never stops a run."""

import importlib.util
import json
import os
import resource
import threading
from pathlib import Path

import torch

from iomm.config import InputError
from iomm.engine.data.atomic import whole_file
from iomm.profiling import Clock, named

# For a key at the start, for its server at the end.
WANDB_PATIENCE_S = 30

# Dense bf16 peak of one device, FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device):
    """Known bf16 peak of this device in FLOP/s, or None (every CPU, any other GPU). fp8 runs are held against it too."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_gib(device):
    """Peak memory of this process so far in GiB: GPU memory allocated by torch, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_wandb():
    """Raises InputError where log.wandb asks for a package that is not there. A folder ./wandb, which it leaves, is none."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        raise InputError(
            "log.wandb=true needs the package wandb: pip install wandb, or set log.wandb=false"
        )


class Metrics:
    """Writes one record a step. Only rank 0 has one.

    A record is of the time since the record before, so that a checkpoint counts for the step after it. It is that of rank
    0's device: `clock`, entered by who trains, splits it by part (iomm/profiling.py).
    images_per_s = global batch / step_s; a pair counts as an image.
    tokens_per_s = latent and condition tokens that the generator reads of one sample (flops.tokens_per_image, the mean over
    images, pairs and masks; padding not counted) x images_per_s.
    mfu = FLOPs that the method needs for one sample (flops.flops_by_part, the mean over images and pairs; recomputation and
    padding not counted) x images_per_s / (peak FLOP/s of one device x devices).
    memory_gib: peak of rank 0 so far. gpu_hours: of all ranks since step 0, gpu_hours_left: by the median of 20 steps.

    Whatever fails in here is said once and costs a record, never a step.
    """

    def __init__(
        self,
        run_dir,
        *,
        flops_per_image,
        global_batch,
        num_steps,
        ranks,
        start_step=0,
        gpu_hours=0.0,
        tokens_per_image=0,
        wandb=False,
        settings=None,
    ):
        """wandb: also to Weights & Biases, with `settings` as the run's config."""
        self.dir = Path(run_dir)
        self.flops, self.tokens, self.global_batch, self.num_steps = (
            flops_per_image,
            tokens_per_image,
            global_batch,
            num_steps,
        )
        self.size, self.device, self.peak = ranks.size, ranks.device, peak_flops(ranks.device)
        self.gpu_hours = gpu_hours
        self.recent, self.carried = [], {}
        self.said, self.file, self.cut, self.board, self.wandb = set(), None, False, None, None
        self.careful("log.jsonl", self.open_lines, start_step)
        self.board = self.careful("TensorBoard", self.open_board, start_step)
        if wandb:
            self.wandb = self.careful("wandb", self.open_wandb, settings)
        self.clock = Clock(ranks.device)

    def careful(self, sink, work, *args):
        """What work(*args) returns, or None and one line the first time that it fails."""
        try:
            return work(*args)
        except Exception as error:
            # of whatever kind: tensorboard and wandb raise their own
            if sink not in self.said:
                self.said.add(sink)
                print(
                    f"{sink} cannot be written: {' '.join(str(error).split())[:200]}; training goes on",
                    flush=True,
                )

    def open_lines(self, start_step):
        path = self.dir / "log.jsonl"
        if path.exists():
            self.trim(path, start_step)
        path.touch()
        self.file = open(path, "r+b", buffering=0)
        self.file.seek(0, os.SEEK_END)

    def trim(self, path, start_step):
        """Drops the lines of steps that a resumed run does again; the others know of an evaluation after the checkpoint."""
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= start_step:
                    kept.append(line + "\n")
                    self.gpu_hours = max(self.gpu_hours, row.get("gpu_hours", 0.0))
            except (ValueError, KeyError, TypeError):
                # A line that a kill or a full disk has cut.
                continue
        # A kill in here must not cost the lines before.
        with whole_file(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")

    def open_board(self, start_step):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.dir / "tb", purge_step=start_step + 1)

    def open_wandb(self, settings):
        """A resumed run goes on in the one of the same name. Who is asked for a key and does not answer trains without."""
        import wandb

        name = self.dir.absolute().name
        return wandb.init(
            project=self.dir.absolute().parent.name,
            name=name,
            id=name,
            resume="allow",
            dir=self.dir,
            config=settings,
            settings={"login_timeout": WANDB_PATIENCE_S},
        )

    def record(
        self,
        *,
        step,
        loss,
        by_time,
        grad_norm,
        lr,
        data_wait_s,
        skipped_steps,
        skipped_samples,
        align_loss=None,
    ):
        """Step counts from 1. loss: of the velocity alone. align_loss: mean over the aligned samples, None without any.
        by_time: loss sums, then counts, of equal intervals of t from image (0) to noise (1). Returns the record.
        """
        split, beside = self.clock.read()
        for part, seconds in self.carried.items():
            split[part] = split.get(part, 0.0) + seconds
        self.carried = {}
        step_s = sum(split.values())
        self.recent = [*self.recent[-19:], step_s]
        images_per_s = self.global_batch / step_s
        self.gpu_hours += step_s * self.size / 3600
        typical_s = sorted(self.recent)[len(self.recent) // 2]
        row = {
            "step": step,
            "samples_seen": step * self.global_batch,
            "loss": loss,
            "align_loss": align_loss,
            "loss_by_time": [
                total / count if count else None for total, count in zip(*halves(by_time))
            ],
            "grad_norm": grad_norm,
            "lr": lr,
            "images_per_s": images_per_s,
            "tokens_per_s": self.tokens * images_per_s,
            "mfu": self.flops * images_per_s / (self.peak * self.size) if self.peak else None,
            "data_wait_s": data_wait_s,
            "step_s": step_s,
            "time_s": split,
            "memory_gib": memory_gib(self.device),
            "skipped_steps": skipped_steps,
            "skipped_samples": skipped_samples,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_left": typical_s * (self.num_steps - step) * self.size / 3600,
        }
        # Parts on other streams: not of the sum.
        if beside:
            row["time_beside_s"] = beside
        self.careful("log.jsonl", self.write_line, row)
        self.show(row)
        return row

    def add(self, row, evaluated):
        """Puts what evaluation.Evaluation found after the last record, in a part of that name, into that record, and returns
        it. The record was written before, and so before a checkpoint of its step: whatever ends a run, none is missing.
        """
        # A checkpoint's seconds, say, are the next step's.
        self.carried, _ = self.clock.read()
        found = evaluated | {"evaluation_s": self.carried.pop("evaluation", 0.0)}
        self.gpu_hours += found["evaluation_s"] * self.size / 3600
        row |= found | {"gpu_hours": self.gpu_hours}
        self.careful("log.jsonl", self.write_line, row, True)
        self.show({"step": row["step"], **found})
        return row

    def report(self):
        """Write run.dir/report.html and the sheets in samples/; return its path, None if that fails."""
        from iomm.engine.observe.report import write_run

        with named("report"):
            return self.careful("report.html", write_run, self.dir)

    def show(self, row):
        if self.board is not None and not self.careful("TensorBoard", self.write_board, row):
            # Its thread has ended; the next write would wait for it.
            self.board = None
        if self.wandb is not None and not self.careful("wandb", self.write_wandb, row):
            self.wandb = None

    def write_line(self, row, again=False):
        """One write a line, tried anew every step: there may be room again. `again`: over the last line, which is shorter."""
        if self.file is None:
            return
        if again and not self.cut:
            self.file.seek(self.start)
        line = b"\n" * self.cut + json.dumps(row).encode() + b"\n"
        self.start, self.cut = self.file.tell() + self.cut, True
        if self.file.write(line) < len(line):
            raise OSError("the disk is full")
        self.cut = False

    def write_board(self, row):
        for key, value in scalars(row).items():
            self.board.add_scalar(key, value, row["step"])
        if row.get("samples"):
            self.image("evaluate", row["samples"], row["step"])
        return True

    def write_wandb(self, row):
        self.wandb.log(scalars(row), step=row["step"])
        return True

    def image(self, tag, path, step):
        """Shows a PNG in TensorBoard."""

        def show():
            import numpy as np
            from PIL import Image

            self.board.add_image(
                tag, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC"
            )

        if self.board is not None:
            self.careful("TensorBoard", show)

    def close(self):
        if self.file is not None:
            self.careful("log.jsonl", self.file.close)
        if self.board is not None:
            self.careful("TensorBoard", self.board.close)
        # It waits for its server; the end of a run does not, for long.
        if self.wandb is not None:
            finish = threading.Thread(
                target=lambda: self.careful("wandb", self.wandb.finish), daemon=True
            )
            finish.start()
            finish.join(WANDB_PATIENCE_S)


def scalars(row):
    """A record -> {name: number}, its lists and groups, at any depth, spread out as name/part; what is no number is left out."""
    flat = {}

    def spread(name, value):
        if isinstance(value, dict | list):
            for part, item in value.items() if isinstance(value, dict) else enumerate(value):
                spread(f"{name}/{part}", item)
        elif isinstance(value, int | float):
            flat[name] = value

    for key, value in row.items():
        if key != "step":
            spread(key, value)
    return flat


def halves(values):
    """[a, b, c, d] -> [a, b], [c, d]."""
    return values[: len(values) // 2], values[len(values) // 2 :]


def line(row, num_steps):
    """One record as the terminal shows it; of the split the three parts that take longest."""
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] is not None else ""
    norm = f"{row['grad_norm']:.3f}" if row["grad_norm"] is not None else "skipped"
    longest = sorted(row["time_s"].items(), key=lambda part: -part[1])[:3]
    split = ", ".join(f"{name} {seconds / row['step_s']:.0%}" for name, seconds in longest)
    align = f"  align {row['align_loss']:.4f}" if row["align_loss"] is not None else ""
    heldout = "".join(
        f"  held-out {kind} {loss['mean']:.4f}"
        for kind, loss in row.get("heldout_loss", {}).items()
    )
    heldout += f"  fits {row['scores']['fits']:.0%}" if "scores" in row else ""
    return (
        f"step {row['step']}/{num_steps}  loss {row['loss']:.4f}{align}{heldout}  grad norm {norm}  "
        f"lr {row['lr']:.2e}  "
        f"{row['images_per_s']:.1f} images/s  {row['tokens_per_s']:,.0f} tokens/s{mfu}  "
        f"data wait {row['data_wait_s'] * 1e3:.0f} ms  {split}  "
        f"GPU-hours {row['gpu_hours']:.2f} used, {row['gpu_hours_left']:.2f} left"
    )
