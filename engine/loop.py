"""The training step, and the loop around it."""

from itertools import islice

import torch
import torch.distributed as dist
from torch.profiler import record_function
from tqdm import tqdm

from iomm.engine import checkpoint
from iomm.engine.metrics import line
from iomm.engine.optim import learning_rate
from iomm.flow import loss_by_time


def train_step(sharded, batches):
    """One optimizer step over this rank's micro-batches -> (mean loss, its sum and count by time bucket (2, buckets),
    whether weights changed, seconds waited for data, samples that had to be replaced)."""
    losses, by_time, wait_s, failures = [], 0, 0.0, []
    for batch in named("data", batches):         # one micro-batch each
        loss, loss_B, t_B = sharded(batch.pixels_BCHW, batch.vit_pixels_BCHW, batch.n_B, batch.latents_BCHW,
                                     batch.captions, batch.has_image)
        with record_function("backward"):
            sharded.backward(loss)
        with record_function("optimizer"):
            applied = sharded.step()             # acts only on the last one
        losses.append(loss.detach())
        by_time, wait_s = by_time + torch.stack(loss_by_time(loss_B, t_B)), wait_s + batch.wait_s
        failures += batch.failures
    return torch.stack(losses).mean(), by_time, applied, wait_s, failures


def named(name, items):
    """The items, each fetched inside a named range of the trace."""
    items, end = iter(items), object()
    while True:
        with record_function(name):
            item = next(items, end)
        if item is end:
            return
        yield item


def train(state, source, config, metrics=None, window=None):
    """Runs steps state.step + 1 ... train.steps. `metrics` is None on all ranks but the first."""
    sharded, ema, guard, ranks = state.sharded, state.ema, state.guard, state.ranks
    batches, batch = iter(source), config.train.global_batch
    bar = tqdm(total=config.train.steps, initial=state.step, disable=None if ranks.first else True, unit="step")
    while state.step < config.train.steps:
        lr = learning_rate(state.step, config.optim, config.train.steps)
        sharded.set_lr(lr)
        if window is not None:
            window.before(state.step + 1)
        loss, by_time, applied, wait_s, failures = train_step(sharded, islice(batches, source.accumulation_steps))
        if applied:
            with record_function("ema"):
                ema.update(state.step)
        state.step += 1
        guard.saw(state.step, (state.step - 1) * batch, state.step * batch - 1, applied)
        sums = torch.cat((loss[None] / ranks.size, by_time.flatten(), loss.new_tensor([len(failures)])))
        dist.all_reduce(sums)                    # one message: loss, sums and counts by time, replaced samples
        if sums[-1] > 0:
            state.skips.saw(sum(ranks.all(failures), []), state.step * batch)
        if metrics is not None:
            loss, *by_time, _ = sums.tolist()
            row = metrics.record(
                step=state.step, loss=loss, by_time=by_time, grad_norm=sharded.grad_norm() if applied else None, lr=lr,
                data_wait_s=wait_s, skipped_steps=guard.total, skipped_samples=state.skips.total)
            state.gpu_hours = row["gpu_hours"]
            if state.step % config.log.every_steps == 0 or state.step == 1:
                bar.write(line(row, config.train.steps))
        bar.update()
        if window is not None:
            window.after(state.step)
        if state.step % config.checkpoint.every_steps == 0 or state.step == config.train.steps:
            with record_function("checkpoint"):
                save(state, config)
    bar.close()


class State:
    """What a checkpoint holds: weights, moments, average, step. Everything else is a function of the config."""

    def __init__(self, sharded, ema, guard, skips, ranks):
        self.sharded, self.ema, self.guard, self.skips, self.ranks = sharded, ema, guard, skips, ranks
        self.step, self.gpu_hours = 0, 0.0

    def tensors(self):
        slots = self.sharded.slots()
        if self.ema.flats:
            slots["ema"] = self.ema.flats
        return {f"{slot}/{name}": view for slot, flats in slots.items() for name, view in self.sharded.views(flats).items()}


def save(state, config):
    """Commits a checkpoint of the state, on all ranks together."""
    facts = {"config": config.to_yaml(), "shapes": state.sharded.shapes, "ema": bool(state.ema.flats),
             "optimizer_step": state.sharded.optimizer_step, "skipped_steps": state.guard.total,
             "skipped_samples": state.skips.state(), "samples_seen": state.step * config.train.global_batch,
             "gpu_hours": state.gpu_hours}
    return checkpoint.save(f"{config.run.dir}/checkpoints", state.step, state.tensors(), facts, state.ranks,
                           config.checkpoint.keep)


@torch.no_grad()
def restore(state, folder):
    """Reads a checkpoint into the state, whatever number of ranks wrote it."""
    reader = checkpoint.Reader(folder)
    for key, view in state.tensors().items():
        slot, name = key.split("/", 1)
        view.copy_(reader.piece(slot, name, state.ranks.rank, state.ranks.size))
    state.sharded.restored(reader.manifest["optimizer_step"])
    state.step, state.gpu_hours = reader.manifest["step"], reader.manifest["gpu_hours"]
    state.guard.total = reader.manifest["skipped_steps"]
    state.skips.restore(reader.manifest["skipped_samples"])
