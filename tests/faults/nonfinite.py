"""A whole run in which every second step, from the first to the last, meets a number that is not finite, in one place, on one rank.

    deepspeed nonfinite.py REPORT NUM_INJECTIONS <arguments of engine/launch.py>

REPORT-rank<r>.json: for every step whether weights changed; hashes of masters, moments and average, the first of them before
step 1.
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


def planned(num_injections):
    """{step: (place, value, rank)}: odd steps, every place with every value, ranks in turn."""
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
    plan, now, record = planned(num_injections), {}, {"applied": [], "hashes": []}

    def here(place):
        wanted = plan.get(now.get("step"), (None, 0, 0))
        return wanted[1] if wanted[0] == place and wanted[2] == dist.get_rank() else None

    def spoilt(tensor, place):
        if here(place) is None:
            return tensor
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 3] = here(place)
        return tensor

    encode, read, call, step, train, train_step = (
        IOMM.encode,
        IOMM.encode_condition,
        zero.Sharded.__call__,
        zero.Sharded.step,
        loop.train,
        loop.train_step,
    )
    IOMM.encode = lambda self, pixels, n_B: spoilt(
        encode(self, spoilt(pixels, "pixel"), n_B), "latent"
    )

    def read_spoilt(self, *args):
        hidden, lengths = read(self, *args)
        factor = torch.ones_like(hidden)
        return hidden * spoilt(factor, "embedding"), lengths

    def call_spoilt(self, *args):
        loss, *others = call(self, *args)
        return (loss if here("loss") is None else loss * here("loss")), *others

    def step_spoilt(self):
        if here("gradient") is not None:
            gradient = self.layout.gradients()[0]
            gradient.view(-1)[gradient.numel() // 2] = here("gradient")
        moment = self.slots()["exp_avg"][0]
        kept = moment[7].clone()
        if here("moment") is not None:
            moment[7] = here("moment")
        applied = step(self)
        if here("moment") is not None:
            moment[7] = kept
        return applied

    def train_recorded(state, *args, **kwargs):
        now["state"], now["step"] = state, 0
        done = train(state, *args, **kwargs)
        record["hashes"].append(digest(state))
        return done

    def step_recorded(*args, **kwargs):
        now["step"] += 1
        record["hashes"].append(digest(now["state"]))
        result = train_step(*args, **kwargs)
        record["applied"].append(result[2])
        return result

    IOMM.encode_condition = read_spoilt
    zero.Sharded.__call__, zero.Sharded.step = call_spoilt, step_spoilt
    loop.train, loop.train_step = train_recorded, step_recorded
    code = launch.main(sys.argv[3:])
    with open(f"{report}-rank{launch.os.environ['RANK']}.json", "w") as file:
        json.dump(record, file)
    return code


if __name__ == "__main__":
    # The launcher adds --local_rank in front.
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    sys.exit(main())
