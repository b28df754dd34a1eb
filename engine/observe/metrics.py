"""Metrics of a run: log.jsonl, TensorBoard, the terminal and optionally Weights & Biases.

A failure in here never stops a run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iomm.config import InputError
from iomm.engine.data.atomic import whole_file
from iomm.engine.observe.report import hours_name
from iomm.profiling import Clock, named

if TYPE_CHECKING:
    from collections.abc import Callable

    from iomm.engine.parallel.ranks import Ranks

logger = logging.getLogger("iomm")

# Seconds to wait for a key at the start, and for the server at the end.
WANDB_PATIENCE_S = 30

# Dense bf16 peak of one device in FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 peak of this device in FLOP/s, None if it is unknown, as for every CPU.

    The MFU of fp8 runs refers to it too.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: allocated by torch on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_wandb() -> None:
    """Raise InputError if the package wandb is not installed."""
    found = importlib.util.find_spec("wandb")
    # Runs of wandb leave a folder ./wandb, which looks like a package without a file.
    if found is None or found.origin is None:
        raise InputError(
            "log.wandb=true needs the package wandb: pip install wandb, or set log.wandb=false"
        )


class Metrics:
    """Writes one record per step. Only rank 0 has one.

    Times are those of rank 0's device since the previous record, so a checkpoint counts for the
    step after it. The training loop enters `clock`, which splits them by part
    (iomm/profiling.py).

    images_per_s    global batch / step_s; a pair counts as an image
    tokens_per_s    latent and condition tokens that the generator reads per sample x images_per_s
                    (flops.tokens_per_image: mean over images, pairs and masks, without padding)
    mfu             FLOPs that the method needs per sample x images_per_s / (peak FLOP/s of one
                    device x devices) (flops.flops_by_part: mean over images and pairs, without
                    recomputation and padding)
    memory_gib      peak of rank 0 so far
    gpu_hours       of all ranks since step 0
    gpu_hours_left  from the median of the last 20 steps

    A failure in here is logged once and costs a record, never a step.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        flops_per_image: float,
        global_batch: int,
        num_steps: int,
        ranks: Ranks,
        start_step: int = 0,
        gpu_hours: float = 0.0,
        tokens_per_image: float = 0,
        wandb: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Open all sinks; a resumed run's rows after start_step are dropped.

        Args:
            run_dir: folder of the run.
            flops_per_image: FLOPs that the method needs for one sample.
            global_batch: samples per step.
            num_steps: steps of the whole run.
            ranks: for their number and the device.
            start_step: step that the run resumes from.
            gpu_hours: used up to start_step.
            tokens_per_image: tokens that the generator reads per sample.
            wandb: log to Weights & Biases as well.
            settings: config for Weights & Biases.
        """
        self.dir = Path(run_dir)
        self.flops, self.tokens = flops_per_image, tokens_per_image
        self.global_batch, self.num_steps = global_batch, num_steps
        self.size, self.device, self.peak = ranks.size, ranks.device, peak_flops(ranks.device)
        self.gpu_hours = gpu_hours
        # Their name for people.
        self.hours = hours_name(ranks.device.type == "cuda")
        self.recent, self.carried = [], {}
        # Sinks whose failure was logged.
        self.failed = set()
        # cut: the last line of log.jsonl is incomplete.
        self.file, self.cut, self.board, self.wandb = None, False, None, None
        self.attempt("log.jsonl", self.open_lines, start_step)
        self.board = self.attempt("TensorBoard", self.open_board, start_step)
        if wandb:
            self.wandb = self.attempt("wandb", self.open_wandb, settings)
        self.clock = Clock(ranks.device)

    def attempt(self, sink: str, work: Callable, *args: Any) -> Any:
        """Return work(*args), or None if it fails. The first failure of a sink is logged."""
        try:
            return work(*args)
        # Of any kind: tensorboard and wandb raise their own.
        except Exception as error:
            if sink not in self.failed:
                self.failed.add(sink)
                message = " ".join(str(error).split())[:200]
                logger.warning(f"{sink} cannot be written: {message}; training continues")

    def open_lines(self, start_step: int) -> None:
        """Open log.jsonl for appending, after the row of start_step."""
        path = self.dir / "log.jsonl"
        if path.exists():
            self.trim(path, start_step)
        path.touch()
        self.file = path.open("r+b", buffering=0)
        self.file.seek(0, os.SEEK_END)

    def trim(self, path: Path, start_step: int) -> None:
        """Drop the rows of steps that a resumed run repeats.

        The kept rows may count the GPU-hours of an evaluation after the checkpoint.
        """
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= start_step:
                    kept.append(line + "\n")
                    self.gpu_hours = max(self.gpu_hours, row.get("gpu_hours", 0.0))
            except (ValueError, KeyError, TypeError):
                # A kill or a full disk has cut the line.
                continue
        # Atomic: a kill in here must not lose the rows.
        with whole_file(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")

    def open_board(self, start_step: int) -> Any:
        """Return the TensorBoard writer; what it had after start_step is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.dir / "tb", purge_step=start_step + 1)

    def open_wandb(self, settings: dict[str, Any] | None) -> Any:
        """Return the wandb run of this run's name, which a resumed run continues.

        Fails if wandb asks for a key and gets no answer in time.
        """
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
        step: int,
        loss: float,
        by_time: list[float],
        grad_norm: float | None,
        lr: float,
        data_wait_s: float,
        skipped_steps: int,
        skipped_samples: int,
        align_loss: float | None = None,
        cut_captions: int = 0,
    ) -> dict[str, Any]:
        """Write the record of a step and return it.

        Args:
            step: counts from 1.
            loss: the velocity loss.
            by_time: loss sums, then counts, in equal intervals of t from image (0) to noise (1).
            grad_norm: None if the step was skipped.
            lr: the learning rate.
            data_wait_s: seconds in which the step waited for data.
            skipped_steps: in the whole run.
            skipped_samples: in the whole run.
            align_loss: mean over the aligned samples, None without any.
            cut_captions: in the whole run.
        """
        split, other_streams = self.clock.read()
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
                total / count if count else None
                for total, count in zip(*halves(by_time), strict=True)
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
            "cut_captions": cut_captions,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_left": typical_s * (self.num_steps - step) * self.size / 3600,
        }
        # Parts on other streams, not included in step_s.
        if other_streams:
            row["time_beside_s"] = other_streams
        self.attempt("log.jsonl", self.write_line, row)
        self.show(row)
        return row

    def add(self, row: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
        """Add the results of an evaluation to the last record, write it again and return it.

        The evaluation ran in a clock part of that name. The record was first written before the
        checkpoint of its step, so no row is missing however the run ends.
        """
        # Other parts, such as a checkpoint's, count for the next step.
        self.carried, _ = self.clock.read()
        found = evaluated | {"evaluation_s": self.carried.pop("evaluation", 0.0)}
        self.gpu_hours += found["evaluation_s"] * self.size / 3600
        row |= found | {"gpu_hours": self.gpu_hours}
        self.attempt("log.jsonl", self.write_line, row, True)
        self.show({"step": row["step"], **found})
        return row

    def report(self) -> Path | None:
        """Write run.dir/report.html and the sheets in samples/. Return its path or None."""
        from iomm.engine.observe.report import write_run

        with named("report"):
            return self.attempt("report.html", write_run, self.dir)

    def show(self, row: dict[str, Any]) -> None:
        """Write a row to TensorBoard and wandb. One that failed is not used again."""
        if self.board is not None and not self.attempt("TensorBoard", self.write_board, row):
            # Its thread has ended, and the next write would wait for it.
            self.board = None
        if self.wandb is not None and not self.attempt("wandb", self.write_wandb, row):
            self.wandb = None

    def write_line(self, row: dict[str, Any], again: bool = False) -> None:
        """Write a row with one system call. Each step tries anew: the disk may have room again.

        again: overwrite the last row, which is shorter.
        """
        if self.file is None:
            return
        if again and not self.cut:
            self.file.seek(self.start)
        line = json.dumps(row).encode() + b"\n"
        self.start = self.file.tell()
        if self.cut:
            line = b"\n" + line
            self.start += 1
        self.cut = True
        if self.file.write(line) < len(line):
            raise OSError("the disk is full")
        self.cut = False

    def write_board(self, row: dict[str, Any]) -> bool:
        for key, value in scalars(row).items():
            self.board.add_scalar(key, value, row["step"])
        if row.get("samples"):
            self.image("evaluate", row["samples"], row["step"])
        return True

    def write_wandb(self, row: dict[str, Any]) -> bool:
        self.wandb.log(scalars(row), step=row["step"])
        return True

    def image(self, tag: str, path: str | Path, step: int) -> None:
        """Show a PNG in TensorBoard."""

        def show() -> None:
            import numpy as np
            from PIL import Image

            self.board.add_image(
                tag, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC"
            )

        if self.board is not None:
            self.attempt("TensorBoard", show)

    def close(self) -> None:
        """Close all sinks."""
        if self.file is not None:
            self.attempt("log.jsonl", self.file.close)
        if self.board is not None:
            self.attempt("TensorBoard", self.board.close)
        # wandb waits for its server without a limit.
        if self.wandb is not None:
            finish = threading.Thread(
                target=lambda: self.attempt("wandb", self.wandb.finish), daemon=True
            )
            finish.start()
            finish.join(WANDB_PATIENCE_S)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record as {name: number}.

    Numbers in lists and dicts, at any depth, are named name/part.
    """
    flat = {}

    def spread(name: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for part, item in value.items() if isinstance(value, dict) else enumerate(value):
                spread(f"{name}/{part}", item)
        elif isinstance(value, int | float):
            flat[name] = value

    for key, value in row.items():
        if key != "step":
            spread(key, value)
    return flat


def halves(values: list[float]) -> tuple[list[float], list[float]]:
    """Return the first and the second half of a list."""
    return values[: len(values) // 2], values[len(values) // 2 :]


def line(row: dict[str, Any], num_steps: int, hours: str = "GPU-hours") -> str:
    """Return a record as a line for the terminal, with the three parts that took longest.

    hours: as Metrics.hours.
    """
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] is not None else ""
    norm = f"{row['grad_norm']:.3f}" if row["grad_norm"] is not None else "skipped"
    longest = sorted(row["time_s"].items(), key=lambda part: -part[1])[:3]
    split = ", ".join(f"{name} {seconds / row['step_s']:.0%}" for name, seconds in longest)
    align = f"  align {row['align_loss']:.4f}" if row["align_loss"] is not None else ""
    heldout = "".join(
        f"  held-out {kind} {loss['mean']:.4f}"
        for kind, loss in row.get("heldout_loss", {}).items()
    )
    cut = f"  cut captions {row['cut_captions']:,}" if row.get("cut_captions") else ""
    heldout += f"  fits {row['scores']['fits']:.0%}" if "scores" in row else ""
    return (
        f"step {row['step']}/{num_steps}  loss {row['loss']:.4f}{align}{heldout}  "
        f"grad norm {norm}  lr {row['lr']:.2e}  "
        f"{row['images_per_s']:.1f} images/s  {row['tokens_per_s']:,.0f} tokens/s{mfu}  "
        f"data wait {row['data_wait_s'] * 1e3:.0f} ms{cut}  {split}  "
        f"{hours} {row['gpu_hours']:.2f} used, {row['gpu_hours_left']:.2f} left"
    )
