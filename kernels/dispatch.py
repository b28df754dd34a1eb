"""Which body of an op runs: the first one registered that can, unless IOMM_KERNELS says otherwise.

`IOMM_KERNELS=op:body[,op:body]` forces a body; naming one that cannot run is an error. `table()` says what was picked
and why the others were not; a run prints it at its start.

The order of registration is by measurement. A body that no benchmark has shown ahead on the device it is for stands
behind the library or PyTorch's formula, unless those cannot do the work at all; a body that a benchmark has shown
behind is removed, with its number in benchmarks/LOG.md. As of 2026-11-23 that puts every Triton body second: they are
proven in the interpreter and compiled, and have not been timed on a GPU (`python benchmarks/ops.py --gpu`).
"""

import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@cache
def cpu_has_bf16():
    """Whether this CPU multiplies bfloat16 faster than float32; one with AVX2 alone took 22 times as long (LOG.md, 2026-11-26)."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@dataclass(frozen=True, kw_only=True)
class Body:
    """One implementation of an op. `why_not()` returns the reason why it cannot run on this machine, or None."""

    name: str
    fn: callable
    # Device types; empty: any.
    devices: tuple = ()
    # Torch dtypes; empty: any.
    dtypes: tuple = ()
    why_not: callable = None
    # Why it stands behind others that can run too.
    note: str = ""

    def refusal(self, device, dtype=None):
        """Why this body cannot serve the device type and dtype, or None."""
        if self.devices and device not in self.devices:
            return f"for {', '.join(self.devices)} only"
        if dtype is not None and self.dtypes and dtype not in self.dtypes:
            return f"takes {self.dtype_names} only"
        return self.why_not() if self.why_not else None

    @property
    def dtype_names(self):
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)


_bodies = {}


def register(op, name, fn, *, devices=(), dtypes=(), why_not=None, note=""):
    """Adds a body to an op. The order of registration is the order of preference; `note` says why not further up."""
    body = Body(name=name, fn=fn, devices=devices, dtypes=dtypes, why_not=why_not, note=note)
    _bodies.setdefault(op, []).append(body)


def ops():
    """Names of all ops: the modules and packages beside this file, its helpers excepted."""
    here = Path(__file__).resolve().parent
    names = {path.stem for path in here.glob("*.py")} | {
        path.parent.name for path in here.glob("*/__init__.py")
    }
    return sorted(names - {"dispatch", "native", "triton_ops"})


def overrides():
    """IOMM_KERNELS as {op: body}. Raises ValueError if it cannot be read or names an unknown op."""
    chosen = {}
    for item in filter(None, os.environ.get("IOMM_KERNELS", "").replace(" ", "").split(",")):
        op, colon, body = item.partition(":")
        if not (op and colon and body):
            raise ValueError(f"IOMM_KERNELS must read op:body[,op:body], got {item!r}")
        if op not in ops():
            raise ValueError(
                f"IOMM_KERNELS names the unknown op {op!r}; ops are {', '.join(ops())}"
            )
        chosen[op] = body
    return chosen


def _choose(op, device, dtype=None):
    bodies = _bodies[op]
    forced = overrides().get(op) if os.environ.get("IOMM_KERNELS") else None
    if forced is not None:
        body = next((body for body in bodies if body.name == forced), None)
        if body is None:
            names = ", ".join(body.name for body in bodies)
            raise ValueError(
                f"IOMM_KERNELS names the unknown body {forced!r} of {op}; bodies are {names}"
            )
        if refusal := body.refusal(device, dtype):
            raise ValueError(
                f"IOMM_KERNELS asks for {op}:{forced}, which cannot run on {device}: {refusal}"
            )
        return body
    for body in bodies:
        if body.refusal(device, dtype) is None:
            return body
    reasons = "; ".join(f"{body.name}: {body.refusal(device, dtype)}" for body in bodies)
    raise ValueError(f"{op} has no body for {dtype} on {device} ({reasons})")


# torch.compile asks once and traces the body, not the choice
@torch.compiler.assume_constant_result
def _chosen_index(op, device, dtype):
    return _bodies[op].index(_choose(op, device, dtype))


def pick(op, device, dtype=None):
    """The function that runs `op` on this torch.device (and dtype, where bodies differ by it)."""
    return _bodies[op][_chosen_index(op, device.type, dtype)].fn


def table(device="cpu"):
    """Rows (op, device type, picked body, [(other body, why not)]) of every op on a torch.device or its name."""
    device = torch.device(device).type
    rows = []
    for op in ops():
        importlib.import_module(f"iomm.kernels.{op}")
        picked = _choose(op, device)
        others = []
        for body in _bodies[op]:
            if body is not picked:
                reason = body.refusal(device)
                if reason is None and op in overrides():
                    reason = f"IOMM_KERNELS names {picked.name}"
                elif reason is None and picked.dtypes:
                    reason = f"for other dtypes than {picked.dtype_names}"
                elif reason is None:
                    reason = body.note or f"after {picked.name}"
                others.append((body.name, reason))
        rows.append((op, device, picked.name, others))
    return rows


def format_table(device="cpu"):
    """`table()` as text, a line per op."""
    lines = []
    for op, device_type, picked, others in table(device):
        reasons = "; ".join(f"{name} ({reason})" for name, reason in others)
        lines.append(
            f"{op:<18} {device_type:<5} {picked:<10} {'not ' + reasons if reasons else ''}".rstrip()
        )
    return "\n".join(lines)
