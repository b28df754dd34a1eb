"""The training step, and the loop around it."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine.observe.metrics import line
from iomm.engine.parallel.optim import learning_rate
from iomm.engine.parallel.prefetch import Prefetcher
from iomm.engine.resilience.preemption import Stop
from iomm.engine.state import State, save
from iomm.flow import loss_by_time
from iomm.profiling import named, named_each, named_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from iomm.engine.config import RunConfig
    from iomm.engine.data.bad_samples import Failure
    from iomm.engine.data.source import Batch, ImageSource
    from iomm.engine.evaluation.heldout import Evaluation
    from iomm.engine.observe.metrics import Metrics
    from iomm.engine.observe.tracing import Window
    from iomm.engine.parallel.ranks import Ranks
    from iomm.engine.parallel.zero import Sharded
    from iomm.engine.resilience.checkpoint_writer import Saver
    from iomm.engine.resilience.loss_guard import LossGuard
    from iomm.engine.resilience.watchdog import Watchdog

logger = logging.getLogger("iomm")


class StepResult(NamedTuple):
    """What one rank computed in a step. Reading a tensor would wait for the device."""

    # Mean velocity loss of this rank's samples in float64, ().
    loss: Tensor
    # Sums and counts of the velocity loss in equal intervals of t, (2, intervals).
    by_time: Tensor
    # Whether weights changed.
    applied: bool
    # Seconds in which the step waited for data.
    data_wait_s: float
    # Samples that had to be replaced, and captions that were cut.
    failures: list[Failure]
    # (sample numbers, their losses): velocity and alignment losses, per micro-batch.
    sample_losses: list[tuple[Tensor, Tensor]]
    # Sum and number of the alignment losses, (2,); (0,) without an alignment head.
    align_sums: Tensor


class StepTotals(NamedTuple):
    """Figures of a step over all ranks, on the host."""

    loss: float
    by_time: list[float]
    # Mean over the aligned samples, None without any.
    align_loss: float | None
    # None if the step was skipped.
    grad_norm: float | None
    num_failures: int
    stop_requested: bool


def train_step(
    sharded: Sharded,
    batches: Iterable[Batch],
    loss_factor: Callable[[Tensor], float] | None = None,
    prefetch: Callable[[], None] | None = None,
) -> StepResult:
    """Run one optimizer step over this rank's micro-batches.

    The gradient is that of the velocity and the alignment loss together.

    Args:
        sharded: the model and its optimizer.
        batches: one micro-batch each.
        loss_factor: called with the step's mean velocity loss; its result multiplies the last
            micro-batch's loss. NaN makes all ranks skip the step.
        prefetch: called as soon as the forward pass of a micro-batch is queued.
    """
    losses, sample_losses, align_sums, failures = [], [], [], []
    by_time, data_wait_s = 0, 0.0
    for batch in named_each("data", batches):
        # R: samples x train.noise_draws, I: aligned samples.
        loss, loss_R, t_R, *align_I = sharded(*batch.inputs)
        losses.append(loss_R.mean() if align_I else loss.detach())
        if loss_factor is not None and sharded.last_micro_batch:
            loss = loss * loss_factor(torch.stack(losses).mean())
        if prefetch is not None:
            # Before the backward pass: DeepSpeed's returns only when the GPU has finished it.
            prefetch()
        with named("backward"):
            sharded.backward(loss)
        with named("optimizer"):
            # Updates the weights only after the last micro-batch.
            applied = sharded.step()
        loss_B = loss_R.detach().unflatten(0, (len(batch.n_B), -1)).mean(1)
        sample_losses.append((batch.n_B, loss_B))
        for loss_I in align_I:
            all_aligned = len(loss_I) == len(batch.n_B)
            n_I = batch.n_B if all_aligned else batch.n_B[torch.tensor(batch.has_image)]
            sample_losses.append((n_I, loss_I))
            align_sums.append(torch.stack((loss_I.sum(), loss_I.new_full((), len(loss_I)))))
        by_time = by_time + torch.stack(loss_by_time(loss_R, t_R))
        data_wait_s += batch.wait_s
        failures += batch.failures
    return StepResult(
        loss=torch.stack(losses).double().mean(),
        by_time=by_time,
        applied=applied,
        data_wait_s=data_wait_s,
        failures=failures,
        sample_losses=sample_losses,
        align_sums=sum(align_sums) if align_sums else by_time.new_empty(0),
    )


def train(
    state: State,
    source: ImageSource,
    config: RunConfig,
    saver: Saver,
    watchdog: Watchdog,
    metrics: Metrics | None = None,
    window: Window | None = None,
    evaluation: Evaluation | None = None,
) -> bool:
    """Run steps state.step + 1 ... train.steps on all ranks together.

    Args:
        state: what is trained and saved.
        source: batches from state.step on.
        config: the run's config.
        saver: writes checkpoints.
        watchdog: gets a heartbeat per step.
        metrics: rank 0's; None on all other ranks.
        window: steps to profile.
        evaluation: called between steps.

    Returns:
        True after the last step. False if a signal requested a stop; the state is saved.

    Raises:
        InputError: too many skipped steps or bad samples, or the last checkpoint was not written.
    """
    sharded, ranks = state.sharded, state.ranks
    num_steps, first_step = config.train.steps, state.step
    batches, prefetch, loss_factor = iter(source), None, None
    if config.train.overlap:
        batches = Prefetcher(batches, sharded.module.prepare, ranks.device)
        prefetch = batches.fetch
    if state.loss_guard.skip_spikes:

        def loss_factor(loss: Tensor) -> float:
            return spike_factor(loss, state.loss_guard, ranks)

    # None: no bar unless stderr is a terminal.
    bar = tqdm(
        total=num_steps, initial=state.step, unit="step", disable=None if ranks.first else True
    )
    stop_requested = False
    clock = metrics.clock if metrics is not None else nullcontext()
    with Stop(reports=ranks.first) as stop, clock, completed_save(saver, watchdog):
        while state.step < num_steps and not stop_requested:
            watchdog.heartbeat(state.step + 1)
            lr = learning_rate(state.step, config.optim, num_steps)
            sharded.set_lr(lr)
            if window is not None:
                window.before(state.step + 1)

            micro_batches = islice(batches, source.accumulation_steps)
            result = train_step(sharded, micro_batches, loss_factor, prefetch)
            if result.applied:
                with named("ema"):
                    state.ema.update(state.step)
            state.step += 1

            grad_norm = sharded.grad_norm() if result.applied else None
            totals = reduce_over_ranks(result, grad_norm, stop.requested, ranks)
            stop_requested = totals.stop_requested
            error = check_step(state, result, totals, config.train.global_batch)
            row = None
            if metrics is not None:
                row = record_step(state, metrics, result, totals, lr)

            last = error is not None or stop_requested or state.step == num_steps
            if last or state.step % config.checkpoint.every_steps == 0:
                save_checkpoint(state, config, saver, watchdog)
            if error is not None:
                raise error

            evaluated = {}
            if evaluation is not None and evaluation.due(state.step) and not stop_requested:
                evaluated = evaluate(state, evaluation, watchdog)
                if metrics is not None:
                    state.gpu_hours = metrics.add(row, evaluated)["gpu_hours"]
                    metrics.report()
            if metrics is not None and (
                state.step % config.log.every_steps == 0 or state.step == 1 or evaluated
            ):
                logger.info(line(row, num_steps, metrics.hours))
            bar.update()
            if window is not None:
                window.after(state.step)
        watchdog.pause()
        folder = saver.wait()
    bar.close()
    if folder is None and state.step > first_step:
        raise InputError(
            f"the last checkpoint, of step {state.step}, could not be written. Free some disk "
            "space and start again with --resume auto"
        )
    return state.step == num_steps


def reduce_over_ranks(
    result: StepResult, grad_norm: Tensor | float | None, stop_requested: bool, ranks: Ranks
) -> StepTotals:
    """Return the step's figures over all ranks.

    Takes one collective and one copy from the device, the step's only wait for it: the loss guard,
    skipped steps and a requested stop decide whether the next step runs. A stop requested on any
    rank stops all of them after the same step. The gradient norm is of all ranks already. Sums are
    in float64, where their order has no effect on the float32 result: equal weights give the same
    loss on any number of ranks.
    """
    loss, by_time, align_sums = result.loss, result.by_time, result.align_sums
    # Filled by kernels. A tensor of a list would be copied from the host.
    flags = [loss.new_full((1,), float(x)) for x in (len(result.failures), stop_requested)]
    sums = torch.cat((loss[None] / ranks.size, by_time.flatten(), align_sums, *flags))
    dist.all_reduce(sums)
    # float64 holds every float32 exactly.
    values = [sums.float().double()]
    if torch.is_tensor(grad_norm):
        values.append(grad_norm.double().reshape(1))
    mean_loss, *parts = torch.cat(values).tolist()
    if torch.is_tensor(grad_norm):
        grad_norm = parts.pop()
    *parts, num_failures, num_stops = parts
    by_time, align_sums = parts[: by_time.numel()], parts[by_time.numel() :]
    return StepTotals(
        loss=mean_loss,
        by_time=by_time,
        align_loss=align_sums[0] / align_sums[1] if any(align_sums[1:]) else None,
        grad_norm=grad_norm,
        num_failures=int(num_failures),
        stop_requested=bool(num_stops),
    )


def check_step(
    state: State, result: StepResult, totals: StepTotals, global_batch: int
) -> InputError | None:
    """Record bad samples and the loss, on all ranks together with the same outcome.

    Returns:
        The error that ends the run, or None. The weights are sound: the step is saved first.

    Raises:
        InputError: a sample could not be replaced. The weights were trained on a black image and
            must not be saved.
    """
    samples_seen = state.step * global_batch
    samples = f"samples {samples_seen - global_batch} to {samples_seen - 1}"
    if not result.applied:
        samples += describe_nonfinite(result.sample_losses, state.ranks)
    failures = []
    if totals.num_failures:
        failures = [failure for rank in state.ranks.all(result.failures) for failure in rank]
    try:
        if failures:
            state.bad_samples.record(failures, samples_seen)
        state.loss_guard.record(state.step, totals.loss, samples, result.applied)
    except InputError as error:
        if any(failure.fatal for failure in failures):
            raise
        return error
    return None


def record_step(
    state: State, metrics: Metrics, result: StepResult, totals: StepTotals, lr: float
) -> dict:
    """Write the step's row to log.jsonl and TensorBoard on rank 0, and return it."""
    row = metrics.record(
        step=state.step,
        loss=totals.loss,
        align_loss=totals.align_loss,
        by_time=totals.by_time,
        grad_norm=totals.grad_norm,
        lr=lr,
        data_wait_s=result.data_wait_s,
        skipped_steps=state.loss_guard.total,
        skipped_samples=state.bad_samples.total,
        cut_captions=state.bad_samples.cut_captions,
    )
    state.gpu_hours = row["gpu_hours"]
    return row


def save_checkpoint(state: State, config: RunConfig, saver: Saver, watchdog: Watchdog) -> None:
    """Hand the state to the saver, which writes it in the background by default."""
    if any(state.ranks.all(saver.would_block)):
        # Waiting for the disk may take longer than a step is allowed to.
        watchdog.pause()
    with named("checkpoint"):
        save(state, config, saver)


def evaluate(state: State, evaluation: Evaluation, watchdog: Watchdog) -> dict:
    """Return what the evaluation found. Called after the save of its step."""
    # An evaluation may take longer than a step is allowed to.
    watchdog.pause()
    with named_whole("evaluation"):
        return evaluation(state)


@contextmanager
def completed_save(saver: Saver, watchdog: Watchdog) -> Iterator[None]:
    """Complete the checkpoint that is being written before any exception ends the run.

    The exception may be of this rank alone. The other ranks' threads still write their parts, and
    if one of them has died, the watchdog ends this process.
    """
    try:
        yield
    except BaseException:
        # Waiting for the disk may take longer than a step is allowed to.
        watchdog.pause()
        try:
            saver.wait()
        except Exception as error:
            logger.error(f"the checkpoint that was being written is lost: {error}")
        raise


def spike_factor(loss: Tensor, loss_guard: LossGuard, ranks: Ranks) -> float:
    """Return NaN if the mean loss over all ranks is a spike, else 1.

    Waits for the GPU before the backward pass.
    """
    mean = loss / ranks.size
    dist.all_reduce(mean)
    return float("nan") if loss_guard.is_spike(mean.item()) else 1.0


def describe_nonfinite(sample_losses: list[tuple[Tensor, Tensor]], ranks: Ranks) -> str:
    """Return in words which samples of a skipped step had a non-finite loss.

    Called by all ranks together.
    """
    own = [int(n) for n_B, loss_B in sample_losses for n in n_B[~loss_B.isfinite().cpu()].tolist()]
    bad = sorted({n for rank in ranks.all(own) for n in rank})
    if not bad:
        return "; the loss of each is finite"
    more = " ..." if len(bad) > 16 else ""
    return f"; not finite: {', '.join(map(str, bad[:16]))}{more}"
