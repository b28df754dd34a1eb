"""Choose the backend of an op.

The first registered backend that can run is used, unless IOMM_KERNELS overrides it.
`IOMM_KERNELS=op:backend[,op:backend]` forces a backend; naming one that cannot run is an error.
`table()` lists the chosen backends and why the others were skipped. A run logs it at startup.

Backends are registered in order of measured speed. Where nothing has been timed yet, the order is
that of counted work: a backend comes first if it moves fewer bytes in fewer launches, and its
products, if it has any, are a library's (benchmarks/LOG.md, 2026-11-30). Speed of our own products
cannot be counted, so masked_attention:triton comes after the libraries. A backend that a benchmark
has shown to be slower is removed, and its number is kept in benchmarks/LOG.md. `python
benchmarks/ops.py --gpu` times all of them.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


@cache
def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32.

    On a CPU that has only AVX2, bfloat16 took 22 times as long (benchmarks/LOG.md, 2026-11-26).
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an op.

    `why_not()` returns the reason this backend cannot run on this machine, or None if it can.
    """

    name: str
    fn: Callable[..., Any]
    # Supported device types. Empty means any.
    devices: tuple[str, ...] = ()
    # Supported torch dtypes. Empty means any.
    dtypes: tuple[torch.dtype, ...] = ()
    # Supported head dims, for attention and its inputs. Empty means any.
    head_dims: tuple[int, ...] = ()
    why_not: Callable[[], str | None] | None = None
    # Why this backend is not the default where it can run.
    note: str = ""

    def refusal(
        self, device: str, dtype: torch.dtype | None = None, head_dim: int | None = None
    ) -> str | None:
        """Return why this backend cannot run with these arguments, or None if it can."""
        if self.devices and device not in self.devices:
            return f"supports only {', '.join(self.devices)}"
        if dtype is not None and self.dtypes and dtype not in self.dtypes:
            return f"supports only {self.dtype_names}"
        if head_dim is not None and self.head_dims and head_dim not in self.head_dims:
            return f"does not support a head dim of {head_dim}"
        return self.why_not() if self.why_not else None

    @property
    def dtype_names(self) -> str:
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)


_backends: dict[str, list[Backend]] = {}


def register(
    op: str,
    name: str,
    fn: Callable[..., Any],
    *,
    devices: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = (),
    head_dims: tuple[int, ...] = (),
    why_not: Callable[[], str | None] | None = None,
    note: str = "",
) -> None:
    """Add a backend to an op. Backends are preferred in the order of their registration.

    Args:
        op: Name of the op.
        name: Name of the backend, as IOMM_KERNELS spells it.
        fn: The function to call.
        devices: Supported device types. Empty means any.
        dtypes: Supported dtypes. Empty means any.
        head_dims: Supported head dims. Empty means any.
        why_not: Returns the reason the backend cannot run on this machine, or None if it can.
        note: Why the backend is not preferred over the ones registered before it.
    """
    backend = Backend(
        name=name,
        fn=fn,
        devices=devices,
        dtypes=dtypes,
        head_dims=head_dims,
        why_not=why_not,
        note=note,
    )
    _backends.setdefault(op, []).append(backend)


def ops() -> list[str]:
    """Return the names of all ops, the modules and packages of this folder except helpers."""
    here = Path(__file__).resolve().parent
    names = {path.stem for path in here.glob("*.py")} | {
        path.parent.name for path in here.glob("*/__init__.py")
    }
    return sorted(names - {"dispatch", "native", "triton_ops"})


def overrides() -> dict[str, str]:
    """Return IOMM_KERNELS as {op: backend}.

    Raises:
        ValueError: The variable is malformed or names an unknown op.
    """
    chosen = {}
    for item in filter(None, os.environ.get("IOMM_KERNELS", "").replace(" ", "").split(",")):
        op, colon, backend = item.partition(":")
        if not (op and colon and backend):
            raise ValueError(
                f"IOMM_KERNELS must have the form op:backend[,op:backend], got {item!r}"
            )
        if op not in ops():
            raise ValueError(
                f"IOMM_KERNELS names an unknown op {op!r}. Known ops: {', '.join(ops())}"
            )
        chosen[op] = backend
    return chosen


def _choose(
    op: str, device: str, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> Backend:
    backends = _backends[op]
    forced = overrides().get(op) if os.environ.get("IOMM_KERNELS") else None
    if forced is not None:
        backend = next((backend for backend in backends if backend.name == forced), None)
        if backend is None:
            names = ", ".join(backend.name for backend in backends)
            raise ValueError(
                f"IOMM_KERNELS names an unknown backend {forced!r} of {op}. Known backends: {names}"
            )
        if refusal := backend.refusal(device, dtype, head_dim):
            raise ValueError(
                f"IOMM_KERNELS selects {op}:{forced}, which cannot run on {device}: {refusal}"
            )
        return backend
    for backend in backends:
        if backend.refusal(device, dtype, head_dim) is None:
            return backend
    reasons = "; ".join(
        f"{backend.name}: {backend.refusal(device, dtype, head_dim)}" for backend in backends
    )
    raise ValueError(f"{op} has no backend for {dtype} on {device} ({reasons})")


# torch.compile evaluates the choice once and traces only the chosen backend.
@torch.compiler.assume_constant_result
def _chosen_index(op: str, device: str, dtype: torch.dtype | None, head_dim: int | None) -> int:
    return _backends[op].index(_choose(op, device, dtype, head_dim))


def pick(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> Callable[..., Any]:
    """Return the function that runs `op` on a device, for a dtype and a head dim if given."""
    return _backends[op][_chosen_index(op, device.type, dtype, head_dim)].fn


class TableRow(NamedTuple):
    """The chosen backend of one op on a device type, and (name, reason) of every skipped one."""

    op: str
    device: str
    picked: str
    others: list[tuple[str, str]]


def table(device: torch.device | str = "cpu") -> list[TableRow]:
    """Return the chosen and the skipped backends of every op on a device."""
    device = torch.device(device).type
    rows = []
    for op in ops():
        importlib.import_module(f"iomm.kernels.{op}")
        picked = _choose(op, device)
        others = []
        for backend in _backends[op]:
            if backend is not picked:
                reason = backend.refusal(device)
                if reason is None and op in overrides():
                    reason = f"IOMM_KERNELS selects {picked.name}"
                elif reason is None and backend.note:
                    reason = backend.note
                elif reason is None and picked.dtypes:
                    reason = f"for dtypes other than {picked.dtype_names}"
                elif reason is None:
                    reason = f"{picked.name} is preferred"
                others.append((backend.name, reason))
        rows.append(TableRow(op, device, picked.name, others))
    return rows


def format_table(device: torch.device | str = "cpu") -> str:
    """Return `table()` as text, one line per op."""
    lines = []
    for op, device_type, picked, others in table(device):
        reasons = "; ".join(f"{name} ({reason})" for name, reason in others)
        skipped = f"skipped: {reasons}" if reasons else ""
        lines.append(f"{op:<18} {device_type:<5} {picked:<10} {skipped}".rstrip())
    return "\n".join(lines)
