"""The state of a run: what a checkpoint holds, saved and restored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iomm.config import InputError
from iomm.engine.builders import check_base
from iomm.engine.resilience import checkpoint_reader

if TYPE_CHECKING:
    from pathlib import Path

    from iomm.engine.config import RunConfig
    from iomm.engine.data.bad_samples import BadSamples
    from iomm.engine.parallel.ema import Ema
    from iomm.engine.parallel.ranks import Ranks
    from iomm.engine.parallel.zero import Sharded
    from iomm.engine.resilience.checkpoint_writer import Saver
    from iomm.engine.resilience.loss_guard import LossGuard


class State:
    """Weights, optimizer moments, moving average, counters and step: all that a checkpoint holds.

    Everything else is a function of the config, the data and the base of LoRA. `data` and `base`
    identify these: the results of builders.data_facts and base_facts, which a checkpoint records
    and a resume compares.
    """

    def __init__(
        self,
        sharded: Sharded,
        ema: Ema,
        loss_guard: LossGuard,
        bad_samples: BadSamples,
        ranks: Ranks,
        data: dict[str, list[int]] | None = None,
        base: dict[str, str] | None = None,
    ) -> None:
        self.sharded, self.ema, self.ranks = sharded, ema, ranks
        self.loss_guard, self.bad_samples = loss_guard, bad_samples
        self.data, self.base = data, base
        self.step, self.gpu_hours = 0, 0.0

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """Return {(slot, parameter name): this rank's piece, one-dimensional}.

        A slot has no entry for parameters that it does not cover.
        """
        slots = self.sharded.slots()
        if self.ema.flats:
            slots["ema"] = self.ema.flats
        return {
            (slot, name): flats[place.group].detach().narrow(0, place.offset, place.numel)
            for slot, flats in slots.items()
            for name, place in self.sharded.places.items()
            if flats[place.group] is not None
        }


def save(state: State, config: RunConfig, saver: Saver) -> None:
    """Hand the state as it is now to the saver, on all ranks together."""
    facts = {
        "config": config.to_yaml(),
        "shapes": state.sharded.shapes,
        "ema": bool(state.ema.flats),
        "optimizer_step": state.sharded.optimizer_step,
        "guard": state.loss_guard.state(),
        "skipped_samples": state.bad_samples.state(),
        "samples_seen": state.step * config.train.global_batch,
        "gpu_hours": state.gpu_hours,
        "data": state.data,
        "base": state.base,
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
def restore(state: State, folder: Path | str) -> None:
    """Read a checkpoint into the state, written by any number of ranks at any ZeRO stage.

    Raises:
        InputError: the checkpoint belongs to another model, or was trained on other data or on
            another base of LoRA.
    """
    reader = checkpoint_reader.Reader(folder)
    shapes = {name: list(shape) for name, shape in state.sharded.shapes.items()}
    if shapes != reader.manifest["shapes"]:
        raise InputError(
            f"{folder} is a checkpoint of another model: its parameters have other names or "
            "shapes. Resume with the config of that run"
        )
    saved, current = reader.manifest.get("data"), state.data
    # Checkpoints of earlier versions do not record their data.
    if saved and current and saved != current:
        raise InputError(
            f"{folder} was trained on different data ({changes(saved, current)}). Resume with the "
            "original tars, or start a new run.dir from its weights with --init"
        )
    check_base(folder, reader.manifest.get("base"), state.base)
    for (slot, name), piece in state.tensors().items():
        start = state.sharded.places[name].start
        piece.copy_(reader.piece(slot, name, start, len(piece), first=state.ranks.rank))
    state.sharded.finish_restore(reader.manifest["optimizer_step"])
    state.step, state.gpu_hours = reader.manifest["step"], reader.manifest["gpu_hours"]
    state.loss_guard.restore(reader.manifest["guard"])
    state.bad_samples.restore(
        reader.manifest["skipped_samples"], reader.manifest.get("samples_seen")
    )


def changes(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Describe in words how two results of builders.data_facts differ."""
    found = []
    for kind in sorted(saved.keys() | current.keys()):
        old, new = saved.get(kind, [0, 0]), current.get(kind, [0, 0])
        if old != new:
            other = "other " if old[0] == new[0] else ""
            found.append(f"{old[0]} {kind} before, {new[0]} {other}{kind} now")
    return "; ".join(found)
