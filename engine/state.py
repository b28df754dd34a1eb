"""The state of a run: what a checkpoint holds, saved and restored."""

import torch

from iomm.config import InputError
from iomm.engine.resilience import checkpoint_reader


class State:
    """What a checkpoint holds: weights, moments, average, step. Everything else is a function of the config and the data, of
    which it keeps what builders.data_facts says.
    """

    def __init__(self, sharded, ema, guard, skips, ranks, data=None):
        self.sharded, self.ema, self.guard, self.skips, self.ranks, self.data = (
            sharded,
            ema,
            guard,
            skips,
            ranks,
            data,
        )
        self.step, self.gpu_hours = 0, 0.0

    def tensors(self):
        """{(slot, parameter name): this rank's piece, one-dimensional}; slots a parameter has no part in are left out."""
        slots = self.sharded.slots()
        if self.ema.flats:
            slots["ema"] = self.ema.flats
        return {
            (slot, name): flats[place.group].detach().narrow(0, place.offset, place.numel)
            for slot, flats in slots.items()
            for name, place in self.sharded.places.items()
            if flats[place.group] is not None
        }


def save(state, config, saver):
    """Hands the state as it is now to the saver, on all ranks together."""
    facts = {
        "config": config.to_yaml(),
        "shapes": state.sharded.shapes,
        "ema": bool(state.ema.flats),
        "optimizer_step": state.sharded.optimizer_step,
        "guard": state.guard.state(),
        "skipped_samples": state.skips.state(),
        "samples_seen": state.step * config.train.global_batch,
        "gpu_hours": state.gpu_hours,
        "data": state.data,
    }
    written = {name: place.start for name, place in state.sharded.places.items() if place.written}
    tensors = {f"start/{name}": torch.tensor(start) for name, start in written.items()}
    tensors |= {
        f"{slot}/{name}": piece
        for (slot, name), piece in state.tensors().items()
        if name in written
    }
    saver.save(state.step, tensors, facts)


@torch.no_grad()
def restore(state, folder):
    """Reads a checkpoint into the state, whatever number of ranks wrote it at whatever ZeRO stage."""
    reader = checkpoint_reader.Reader(folder)
    if {name: list(shape) for name, shape in state.sharded.shapes.items()} != reader.manifest[
        "shapes"
    ]:
        raise InputError(f"{folder} is of another model: its parameters have other names or shapes")
    then, now = reader.manifest.get("data"), state.data
    # Nothing is known of an older checkpoint's.
    if then and now and then != now:
        raise InputError(
            f"{folder} is of other data ({changes(then, now)}), in whose order alone it goes on: give the tars of then, or "
            "start a new run.dir from its weights with --init"
        )
    for (slot, name), piece in state.tensors().items():
        piece.copy_(
            reader.piece(
                slot, name, state.sharded.places[name].start, len(piece), first=state.ranks.rank
            )
        )
    state.sharded.finish_restore(reader.manifest["optimizer_step"])
    state.step, state.gpu_hours = reader.manifest["step"], reader.manifest["gpu_hours"]
    state.guard.restore(reader.manifest["guard"])
    state.skips.restore(reader.manifest["skipped_samples"])


def changes(then, now):
    """Two of builders.data_facts -> how they differ, in words."""
    words = []
    for kind in sorted(then.keys() | now.keys()):
        old, new = then.get(kind, [0, 0]), now.get(kind, [0, 0])
        if old != new:
            words.append(
                f"{old[0]} {kind} then, {new[0]} {'others ' if old[0] == new[0] else ''}now"
            )
    return "; ".join(words)
