"""Run engine/launch.py and inject a non-finite number into every second step, on one rank.

    deepspeed nonfinite.py REPORT NUM_INJECTIONS <arguments of engine/launch.py>

Writes REPORT-rank<r>.json: for every step, whether weights changed; hashes of masters, moments and
average, the first of them before step 1.
"""

import hashlib
import itertools
import json
import math
import sys

import torch
import torch.distributed as dist

from iomm.engine import launch, loop
from iomm.engine.parallel import zero
from iomm.model import IOMM

PLACES = ("pixel", "latent", "embedding", "loss", "gradient", "moment")
VALUES = (math.nan, math.inf, -math.inf)


def injections(num_injections):
    """Return {step: (place, value, rank)} for odd steps, which cover all places and values."""
    order = itertools.islice(itertools.cycle(itertools.product(VALUES, PLACES)), num_injections)
    return {
        2 * i + 1: (place, value, (i // len(PLACES) + i) % 2)
        for i, (value, place) in enumerate(order)
    }


def digest(state):
    total = hashlib.sha256()
    for flats in (*state.sharded.slots().values(), state.ema.flats):
        for flat in flats:
            if flat is not None:
                total.update(flat.detach().numpy().tobytes())
    return total.hexdigest()


def main():
    report, num_injections = sys.argv[1], int(sys.argv[2])
    plan, now, record = injections(num_injections), {}, {"applied": [], "hashes": []}

    def value_at(place):
        """Return the value to inject here in this step on this rank, or None."""
        planned_place, value, rank = plan.get(now.get("step"), (None, 0, 0))
        return value if planned_place == place and rank == dist.get_rank() else None

    def inject(tensor, place):
        if value_at(place) is None:
            return tensor
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 3] = value_at(place)
        return tensor

    encode, read, call, step, train, train_step = (
        IOMM.encode,
        IOMM.read,
        zero.Sharded.__call__,
        zero.Sharded.step,
        loop.train,
        loop.train_step,
    )
    IOMM.encode = lambda self, pixels, n_B: inject(
        encode(self, inject(pixels, "pixel"), n_B), "latent"
    )

    def read_and_inject(self, *args):
        hidden, lengths = read(self, *args)
        factor = torch.ones_like(hidden)
        return hidden * inject(factor, "embedding"), lengths

    def call_and_inject(self, *args):
        loss, *others = call(self, *args)
        return (loss if value_at("loss") is None else loss * value_at("loss")), *others

    def inject_and_step(self):
        if value_at("gradient") is not None:
            gradient = self.layout.gradients()[0]
            gradient.view(-1)[gradient.numel() // 2] = value_at("gradient")
        moment = self.slots()["exp_avg"][0]
        kept = moment[7].clone()
        if value_at("moment") is not None:
            moment[7] = value_at("moment")
        applied = step(self)
        if value_at("moment") is not None:
            moment[7] = kept
        return applied

    def record_training(state, *args, **kwargs):
        now["state"], now["step"] = state, 0
        done = train(state, *args, **kwargs)
        record["hashes"].append(digest(state))
        return done

    def record_step(*args, **kwargs):
        now["step"] += 1
        record["hashes"].append(digest(now["state"]))
        result = train_step(*args, **kwargs)
        record["applied"].append(result[2])
        return result

    IOMM.read = read_and_inject
    zero.Sharded.__call__ = call_and_inject
    zero.Sharded.step = inject_and_step
    loop.train = record_training
    loop.train_step = record_step
    code = launch.main(sys.argv[3:])
    with open(f"{report}-rank{launch.os.environ['RANK']}.json", "w") as file:
        json.dump(record, file)
    return code


if __name__ == "__main__":
    # The launcher inserts --local_rank before the arguments.
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    sys.exit(main())
