"""How often to save: an interval from the number of GPUs, the time that a save takes, and the time between faults."""

import math
from dataclasses import dataclass

# Of training time, for saving.
MAX_STALL = 0.01
# 1 % of a run of 1,000 GPU-hours, at one fault
MAX_LOSS_GPU_HOURS = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """interval_s between saves; lost_gpu_hours at one fault, at worst; stall as a share of time; waste, as a share of time,
    by saving and by faults together, on average.
    """

    interval_s: float
    lost_gpu_hours: float
    stall: float
    waste: float


def plan(*, num_gpus, stall_s, write_s, mtbf_gpu_hours):
    """Seconds that training waits for a save, seconds until it is committed, GPU-hours between faults -> Plan.

    A fault just before a commit costs interval + write_s on every GPU. The waste stall / T + (T / 2 + write) / M, M being
    the mean time between faults of the whole job, is least at T = sqrt(2 stall M) (Young 1974); T then goes up to what
    the stall may cost and to write_s, since saves do not overlap, and down to what one fault may lose, which wins.
    """
    between_faults_s = 3600 * mtbf_gpu_hours / num_gpus
    interval_s = max(math.sqrt(2 * stall_s * between_faults_s), stall_s / MAX_STALL, write_s)
    interval_s = min(
        interval_s, max(3600 * MAX_LOSS_GPU_HOURS / num_gpus - write_s, stall_s, write_s)
    )
    return Plan(
        interval_s=interval_s,
        lost_gpu_hours=(interval_s + write_s) * num_gpus / 3600,
        stall=stall_s / interval_s,
        waste=stall_s / interval_s + (interval_s / 2 + write_s) / between_faults_s,
    )


def advice(config, metrics, saver, num_gpus):
    """One line for the end of a run: which checkpoint.every_steps its own figures ask for."""
    found = plan(
        num_gpus=num_gpus,
        stall_s=max(saver.stall_s, 1e-3),
        write_s=saver.write_s,
        mtbf_gpu_hours=config.checkpoint.mtbf_gpu_hours,
    )
    step_s = sorted(metrics.recent)[len(metrics.recent) // 2]
    return (
        f"checkpoint.every_steps={max(1, round(found.interval_s / step_s))} would fit: at a fault at most "
        f"{found.lost_gpu_hours:.2g} GPU-hours lost, {found.stall:.2%} of the time spent waiting for saves"
    )
