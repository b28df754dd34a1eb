"""torchrun with the exit codes of engine/launch.py.

    python engine/torchrun.py <options of torchrun> engine/launch.py <arguments>

torchrun itself replaces every exit code but 0 by 1, and restarts ranks (--max-restarts) whatever
they ended with. A scheduler needs the code to decide about a requeue, and a restart after 2
(refused) or 75 (preempted and saved) is of no use. SIGUSR1 is passed on to the ranks, as SIGTERM
is.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from iomm.checkout import enter

enter(__file__)

import torch.distributed.run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api

from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import DEAD, HUNG, REFUSED

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup

# After these, a restart of the ranks would end in the same way, or collide with the preemption.
FINAL = {REFUSED, REQUEUE}
# Time in seconds that ranks have for their last save after a signal; torchrun's default is 30.
SAVE_S = "600"


class Agent(LocalElasticAgent):
    """The agent of a host, which remembers exit codes and does not restart after a final one."""

    codes: Collection[int] = ()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        super()._shutdown(*args, **kwargs)
        Agent.codes = [handler.proc.returncode for handler in handlers.values()]


def exit_code(codes: Collection[int]) -> int:
    """Return the exit code of a host from those of its ranks.

    A mistake or an unexpected error of one rank comes before what it did to the others.
    """
    # Negative: killed by a signal.
    found = {DEAD if code < 0 else code for code in codes} or {1}
    order = (REFUSED, 1, HUNG, DEAD, REQUEUE, 0)
    return min(found, key=lambda code: order.index(code) if code in order else 1)


def main(argv: list[str]) -> int:
    """Run torchrun and return the exit code."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVE_S)
    api.LocalElasticAgent = Agent
    if not any(word.startswith(("--signals-to-handle", "--signals_to_handle")) for word in argv):
        argv = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *argv]
    try:
        torch.distributed.run.main(argv)
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    except SignalException:
        # The ranks got the signal and have saved.
        return exit_code(Agent.codes)
    except RendezvousError as error:
        # The host of the rendezvous was lost. Ranks that ran have named it.
        print(f"iomm: torchrun's rendezvous failed: {error}", file=sys.stderr)
        return exit_code(Agent.codes) if Agent.codes else DEAD
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
