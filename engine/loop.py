"""The training step, and the loop around it."""

from contextlib import nullcontext
from itertools import islice

import torch
import torch.distributed as dist
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine.observe.metrics import line
from iomm.engine.parallel.optim import learning_rate
from iomm.engine.parallel.prefetch import Prefetcher
from iomm.engine.resilience.preemption import Stop
from iomm.engine.state import save
from iomm.flow import loss_by_time
from iomm.profiling import named, named_each, named_whole


def train_step(sharded, batches, factor=None, look_ahead=None):
    """One optimizer step over this rank's micro-batches -> (mean loss, its sum and count by time bucket (2, buckets),
    whether weights changed, seconds waited for data, samples that had to be replaced, [(samples, their losses)], sum
    and number (2,) of the alignment losses, (0,) without an alignment head).

    The mean loss and its buckets are the velocity's; the gradient is that of both losses.

    factor(mean loss), if given, multiplies the last loss: NaN makes all ranks skip the step. look_ahead(), if given, is
    called when the forward pass of a micro-batch is queued.
    """
    losses, by_time, wait_s, failures, seen, aligned = [], 0, 0.0, [], [], []
    # One micro-batch each
    for batch in named_each("data", batches):
        # R: samples x train.noise_draws.
        loss, loss_R, t_R, *align_I = sharded(*batch.inputs)
        losses.append(loss_R.mean() if align_I else loss.detach())
        if factor is not None and sharded.last_micro_batch:
            loss = loss * factor(torch.stack(losses).mean())
        if look_ahead is not None:
            # now: DeepSpeed's backward pass returns when the GPU has done it
            look_ahead()
        with named("backward"):
            sharded.backward(loss)
        with named("optimizer"):
            # Acts only on the last one.
            applied = sharded.step()
        seen.append((batch.n_B, loss_R.detach().unflatten(0, (len(batch.n_B), -1)).mean(1)))
        for loss_I in align_I:
            every = len(loss_I) == len(batch.n_B)
            seen.append((batch.n_B if every else batch.n_B[torch.tensor(batch.has_image)], loss_I))
            aligned.append(torch.stack((loss_I.sum(), loss_I.new_full((), len(loss_I)))))
        by_time, wait_s = by_time + torch.stack(loss_by_time(loss_R, t_R)), wait_s + batch.wait_s
        failures += batch.failures
    aligned = sum(aligned) if aligned else by_time.new_empty(0)
    return torch.stack(losses).mean(), by_time, applied, wait_s, failures, seen, aligned


def train(state, source, config, saver, watch, metrics=None, window=None, evaluation=None):
    """Runs steps state.step + 1 ... train.steps -> whether it came to the end; if not, SIGTERM or SIGUSR1 asked it to stop
    and it has saved. `metrics` is None on all ranks but the first.
    """
    sharded, ema, guard, ranks = state.sharded, state.ema, state.guard, state.ranks
    batches, batch, look_ahead = iter(source), config.train.global_batch, None
    if config.train.overlap:
        batches = Prefetcher(batches, sharded.module.prepare, ranks.device)
        look_ahead = batches.fetch
    factor = (lambda loss: spike_factor(loss, guard, ranks)) if guard.skip_spikes else None
    bar = tqdm(
        total=config.train.steps,
        initial=state.step,
        disable=None if ranks.first else True,
        unit="step",
    )
    start, asked = state.step, False
    with Stop() as stop, nullcontext() if metrics is None else metrics.clock:
        while state.step < config.train.steps and not asked:
            watch.beat(state.step + 1)
            lr = learning_rate(state.step, config.optim, config.train.steps)
            sharded.set_lr(lr)
            if window is not None:
                window.before(state.step + 1)
            loss, by_time, applied, wait_s, failures, seen, aligned = train_step(
                sharded, islice(batches, source.accumulation_steps), factor, look_ahead
            )
            if applied:
                with named("ema"):
                    ema.update(state.step)
            state.step += 1
            sums = torch.cat(
                (
                    loss[None] / ranks.size,
                    by_time.flatten(),
                    aligned,
                    loss.new_tensor([len(failures), stop.asked]),
                )
            )
            # One message: losses, sums and counts by time, replaced samples, stop.
            dist.all_reduce(sums)
            loss, *parts, failed, asked = sums.tolist()
            by_time, aligned = parts[: by_time.numel()], parts[by_time.numel() :]
            align_loss = aligned[0] / aligned[1] if any(aligned[1:]) else None
            words = f"samples {(state.step - 1) * batch} to {state.step * batch - 1}"
            words = words if applied else words + suspects(seen, ranks)
            lost, mistake = sum(ranks.all(failures), []) if failed else [], None
            try:
                if lost:
                    state.skips.saw(lost, state.step * batch)
                guard.saw(state.step, loss, words, applied)
            except InputError as error:
                # on all ranks alike
                # Weights have learnt from black.
                if any(failure.fatal for failure in lost):
                    raise
                # They are sound: the step is saved before the run ends.
                mistake = error
            row = None
            if metrics is not None:
                row = metrics.record(
                    step=state.step,
                    loss=loss,
                    align_loss=align_loss,
                    by_time=by_time,
                    grad_norm=sharded.grad_norm() if applied else None,
                    lr=lr,
                    data_wait_s=wait_s,
                    skipped_steps=guard.total,
                    skipped_samples=state.skips.total,
                )
                state.gpu_hours = row["gpu_hours"]
            if (
                asked
                or mistake
                or state.step % config.checkpoint.every_steps == 0
                or state.step == config.train.steps
            ):
                if any(ranks.all(saver.waits)):
                    # A disk may take longer than a step.
                    watch.rest()
                with named("checkpoint"):
                    save(state, config, saver)
            if mistake:
                watch.rest()
                saver.wait()
                raise mistake
            evaluated = {}
            if evaluation is not None and evaluation.due(state.step) and not asked:
                evaluated = evaluate(state, evaluation, saver, watch)
                if metrics is not None:
                    state.gpu_hours = metrics.add(row, evaluated)["gpu_hours"]
                    metrics.report()
            if metrics is not None and (
                state.step % config.log.every_steps == 0 or state.step == 1 or evaluated
            ):
                bar.write(line(row, config.train.steps))
            bar.update()
            if window is not None:
                window.after(state.step)
        watch.rest()
        folder = saver.wait()
    bar.close()
    if folder is None and state.step > start:
        raise InputError(
            f"the last checkpoint, of step {state.step}, could not be written: make room, then --resume auto"
        )
    return state.step == config.train.steps


def evaluate(state, evaluation, saver, watch):
    """What it finds. It comes after the save of its step, and what fails in it (memory, say) does not cost that save."""
    # It may take longer than a step.
    watch.rest()
    try:
        with named_whole("evaluation"):
            return evaluation(state)
    except Exception:
        saver.wait()
        raise


def spike_factor(loss, guard, ranks):
    """1, or NaN if the mean loss over all ranks is a spike. Costs a wait for the GPU before the backward pass."""
    mean = loss / ranks.size
    dist.all_reduce(mean)
    return float("nan") if guard.is_spike(mean.item()) else 1.0


def suspects(seen, ranks):
    """Which samples of a skipped step had a loss, of either kind, that is not finite, in words. All ranks together."""
    mine = [int(n) for n_B, loss_B in seen for n in n_B[~loss_B.isfinite().cpu()].tolist()]
    bad = sorted(set(sum(ranks.all(mine), [])))
    return (
        f"; not finite: {', '.join(map(str, bad[:16]))}{' ...' * (len(bad) > 16)}"
        if bad
        else "; the loss of each is finite"
    )
