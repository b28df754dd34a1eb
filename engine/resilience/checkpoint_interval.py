"""Choose how often to save.

The interval follows from the number of GPUs, the time of a save and the mean time between faults.
"""

import math
from dataclasses import dataclass
from typing import Any

from iomm.engine.config import RunConfig
from iomm.engine.resilience.checkpoint_writer import Saver

# Largest share of training time spent waiting for saves.
MAX_STALL = 0.01
# Largest loss of one fault: 1 % of a run of 1,000 GPU-hours.
MAX_LOSS_GPU_HOURS = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The interval between saves and its cost.

    Attributes:
        interval_s: Seconds between saves.
        lost_gpu_hours: GPU-hours that one fault loses in the worst case.
        stall: Share of time spent waiting for saves.
        waste: Mean share of time lost to saves and to faults together.
    """

    interval_s: float
    lost_gpu_hours: float
    stall: float
    waste: float


def plan(*, num_gpus: int, stall_s: float, write_s: float, mtbf_gpu_hours: float) -> Plan:
    """Return the interval between saves that wastes the least time within the limits above.

    A fault just before a commit costs interval + write_s on every GPU. The waste stall / T + (T / 2
    + write) / M, with M the mean time between faults of the whole job, is smallest at T = sqrt(2
    stall M) (Young 1974). T is then raised until the stall is within its limit and to at least
    write_s, since saves do not overlap, and lowered to what one fault may lose, which takes
    precedence.

    Args:
        num_gpus: Number of GPUs of the job.
        stall_s: Seconds that training waits for a save.
        write_s: Seconds until a save is committed.
        mtbf_gpu_hours: Mean GPU-hours between faults.
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


def advice(config: RunConfig, metrics: Any, saver: Saver, num_gpus: int) -> str:
    """Return one line that recommends a checkpoint.every_steps for this run.

    It follows from the times that the run has measured: saver.stall_s, saver.write_s and
    metrics.recent, the seconds of recent steps. metrics.hours names the hours.
    """
    found = plan(
        num_gpus=num_gpus,
        stall_s=max(saver.stall_s, 1e-3),
        write_s=saver.write_s,
        mtbf_gpu_hours=config.checkpoint.mtbf_gpu_hours,
    )
    step_s = sorted(metrics.recent)[len(metrics.recent) // 2]
    return (
        f"recommended: checkpoint.every_steps={max(1, round(found.interval_s / step_s))}; "
        f"one fault then loses at most {found.lost_gpu_hours:.2g} {metrics.hours}, and training "
        f"waits for saves {found.stall:.2%} of the time"
    )
