"""torch.cuda on a machine without a GPU. Import this module before torch, and call install().

The device is an H200 by name whose memory is host memory (pretended_cuda.cpp). Streams and events
are numbers, NCCL is gloo on the same memory, and the CUDA ops of csrc/ run their C++ versions.
`Watch` records where the host waits for the device, and which accesses no stream order covers.
"""

import contextlib
import functools
import inspect
import os
import sys
import threading
import time
import types
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pretended_cuda_build

pretended_cuda_build.load()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
)
from torch.utils._pytree import tree_map_only  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.ops.pretended_cuda
# NCCL's own stream.
NCCL = -1
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=143771 * 2**20,
    multi_processor_count=132,
    L2_cache_size=60 * 2**20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
    is_multi_gpu_board=0,
    gcnArchName="",
    uuid="0",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
)


# ---- order of streams --------------------------------------------------------------------------


class Clocks:
    """Vector clocks: which launches precede the next launch of each stream, and of the host.

    A clock is {stream: its newest launch that precedes}. Launches are numbered over all streams.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.streams = defaultdict(dict)
        self.host = {}
        self.launches = 0

    def launch(self, stream: int) -> int:
        """Return the number of a new launch on the stream."""
        with self.lock:
            self.launches += 1
            # What the host has waited for precedes everything that it launches afterwards.
            self.join(self.streams[stream], self.host)
            self.streams[stream][stream] = self.launches
            return self.launches

    def join(self, clock: dict[int, int], other: dict[int, int]) -> None:
        """Let everything that precedes `other` precede `clock`."""
        with self.lock:
            for stream, launch in other.items():
                clock[stream] = max(launch, clock.get(stream, 0))

    def wait(self, stream: int, other: dict[int, int]) -> None:
        """Let the stream wait for everything that precedes `other`."""
        self.join(self.streams[stream], other)

    def finished(self, clock: dict[int, int]) -> bool:
        """Return whether the host knows already that everything that precedes has run."""
        return all(self.host.get(stream, 0) >= launch for stream, launch in clock.items())


CLOCKS = Clocks()


class Stream(torch.Stream):
    """torch.cuda.Stream."""

    def __new__(cls, device=None, priority=0, stream_id=None, **_):
        if stream_id is not None:
            return super().__new__(cls, stream_id=stream_id, device_index=0, device_type=1)
        return super().__new__(cls, device="cuda:0", priority=priority)

    def __init__(self, *_, **__):
        pass

    @property
    def cuda_stream(self):
        return self.stream_id

    def wait_event(self, event):
        event.wait(self)

    def wait_stream(self, stream):
        CLOCKS.wait(self.stream_id, CLOCKS.streams[stream.stream_id])

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self):
        return True

    def synchronize(self):
        synchronized("stream.synchronize()", CLOCKS.streams[self.stream_id])

    def __eq__(self, other):
        return isinstance(other, torch.Stream) and other.stream_id == self.stream_id

    def __hash__(self):
        return hash(self.stream_id)

    def __enter__(self):
        self.context = use_stream(self)
        return self.context.__enter__()

    def __exit__(self, *error):
        self.context.__exit__(*error)


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.clock = {}
        self.time_s = 0.0

    def record(self, stream=None):
        self.clock = dict(CLOCKS.streams[(stream or current_stream()).stream_id])
        self.time_s = time.perf_counter()

    def wait(self, stream=None):
        CLOCKS.wait((stream or current_stream()).stream_id, self.clock)

    def query(self):
        return True

    def synchronize(self):
        synchronized("event.synchronize()", self.clock)

    def elapsed_time(self, end):
        return (end.time_s - self.time_s) * 1e3


def current_stream(device=None):
    return Stream(stream_id=DEVICE.current_stream())


def set_stream(stream):
    # Of the base class: only its type is accepted.
    torch._C._accelerator_setStream(
        torch.Stream(stream_id=stream.stream_id, device_index=0, device_type=1)
    )


@contextlib.contextmanager
def use_stream(stream):
    """torch.cuda.stream."""
    if stream is None:
        yield
        return
    before = current_stream()
    set_stream(stream)
    try:
        yield stream
    finally:
        set_stream(before)


def synchronize(device=None):
    for clock in list(CLOCKS.streams.values()):
        synchronized("torch.cuda.synchronize()", clock)


def synchronized(what: str, clock: dict[int, int]) -> None:
    """Let the host wait for everything in the clock. It counts unless that is known to be over."""
    if not CLOCKS.finished(clock):
        Watch.waited(what)
        CLOCKS.join(CLOCKS.host, clock)


# ---- torch.cuda --------------------------------------------------------------------------------


class Nothing:
    """A module whose functions do nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def install() -> None:
    """Replace torch.cuda, NCCL and the CUDA library of csrc/ in this process."""
    memory = {
        "memory_allocated": lambda *_: DEVICE.allocated(),
        "memory_reserved": lambda *_: DEVICE.allocated(),
        "max_memory_allocated": lambda *_: DEVICE.peak(),
        "max_memory_reserved": lambda *_: DEVICE.peak(),
        "reset_peak_memory_stats": lambda *_: DEVICE.peak(True) and None,
        "reset_max_memory_allocated": lambda *_: DEVICE.peak(True) and None,
        "reset_max_memory_cached": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda *_: {},
        "mem_get_info": lambda *_: (H200.total_memory - DEVICE.allocated(), H200.total_memory),
    }
    functions = memory | {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device": lambda *_: contextlib.nullcontext(),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_device_name": lambda *_: H200.name,
        "get_device_capability": lambda *_: (H200.major, H200.minor),
        "get_device_properties": lambda *_: H200,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *_, **__: True,
        "is_tf32_supported": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": Event,
        "stream": use_stream,
        "current_stream": current_stream,
        "default_stream": lambda *_: Stream(stream_id=0),
        "set_stream": set_stream,
        "synchronize": synchronize,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
        "default_generators": [torch.default_generator],
        "nccl": types.SimpleNamespace(version=lambda: (2, 29, 0)),
        "ipc_collect": lambda: None,
        "cudart": Nothing,
    }
    for name, value in functions.items():
        setattr(torch.cuda, name, value)
    for name, value in memory.items():
        setattr(torch.cuda.memory, name, value)
    torch.cuda.streams.Stream, torch.cuda.streams.Event = Stream, Event
    torch.cuda.nvtx = Nothing()
    torch.cuda.profiler = Nothing()
    # DeepSpeed allocates buffers by these.
    for name, dtype in {
        "FloatTensor": torch.float32,
        "DoubleTensor": torch.float64,
        "HalfTensor": torch.float16,
        "BFloat16Tensor": torch.bfloat16,
        "ByteTensor": torch.uint8,
        "BoolTensor": torch.bool,
        "IntTensor": torch.int32,
        "LongTensor": torch.int64,
    }.items():
        setattr(torch.cuda, name, legacy_constructor(dtype))
    internals = {
        "_cuda_getCurrentRawStream": lambda *_: DEVICE.current_stream(),
        "_cuda_exchangeDevice": lambda _: 0,
        "_cuda_maybeExchangeDevice": lambda _: 0,
        "_cuda_setDevice": lambda _: None,
        "_cuda_getDevice": lambda: 0,
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_synchronize": lambda: None,
        "_cuda_isInBadFork": lambda: False,
    }
    for name, value in internals.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, value)
    torch.backends.cuda.is_built = lambda: True
    torch.backends.cudnn.is_available = lambda: True
    torch.backends.cuda.is_flash_attention_available = lambda: True
    os.environ["DS_ACCELERATOR"] = "cuda"
    replace_nccl()
    replace_native_library()
    replace_flash_attention()
    replace_triton_ops()


def legacy_constructor(dtype):
    """Return torch.cuda.FloatTensor or another of these."""

    def make(*arguments):
        if arguments and isinstance(arguments[0], list | tuple):
            return torch.tensor(arguments[0], dtype=dtype, device="cuda")
        return torch.empty(*arguments, dtype=dtype, device="cuda")

    return make


def cuda_tensors(values):
    """Return the tensors of an op's arguments or results that are on the device."""
    if isinstance(values, torch.Tensor):
        return [values] if values.is_cuda else []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in cuda_tensors(value)]


# ---- NCCL --------------------------------------------------------------------------------------

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
)


class Done:
    """A collective of a dry run, which has nothing to compute."""

    def wait(self, *timeout):
        return True


class Work:
    """A collective in flight. wait() makes the current stream wait for NCCL's, not the host."""

    def __init__(self, work, clock):
        self.work = work
        self.clock = clock

    def wait(self, *timeout):
        CLOCKS.wait(DEVICE.current_stream(), self.clock)
        return self.work.wait(*timeout)

    def __getattr__(self, name):
        return getattr(self.work, name)


def replace_nccl() -> None:
    """Let NCCL's collectives be gloo's on host views of the same memory."""

    def wrapped(collective):
        signature = inspect.signature(collective)

        def run(*args, **kwargs):
            tensors = cuda_tensors((args, kwargs))
            if not tensors:
                return collective(*args, **kwargs)
            CLOCKS.wait(NCCL, CLOCKS.streams[DEVICE.current_stream()])
            Watch.launched(collective.__name__, [], tensors, NCCL)
            clock = dict(CLOCKS.streams[NCCL])
            if any(map(DEVICE.runs_dry, tensors)):
                async_op = signature.bind(*args, **kwargs).arguments.get("async_op")
                work = Done() if async_op else None
            else:
                args, kwargs = tree_map_only(
                    torch.Tensor, lambda t: DEVICE.host_view(t.detach()), (args, kwargs)
                )
                with _disable_current_modes():
                    work = collective(*args, **kwargs)
            if work is None:
                CLOCKS.wait(DEVICE.current_stream(), clock)
                return None
            return Work(work, clock)

        run.__name__ = collective.__name__
        return run

    for name in COLLECTIVES:
        if hasattr(distributed_c10d, name):
            collective = wrapped(getattr(distributed_c10d, name))
            setattr(distributed_c10d, name, collective)
            setattr(dist, name, collective)
    real = distributed_c10d.init_process_group

    def init_process_group(backend=None, *args, device_id=None, **kwargs):
        return real("gloo" if "nccl" in str(backend) else backend, *args, **kwargs)

    distributed_c10d.init_process_group = dist.init_process_group = init_process_group
    distributed_c10d.is_nccl_available = dist.is_nccl_available = lambda: True


# ---- csrc/ -------------------------------------------------------------------------------------


class NativeLibrary:
    """The library for CPUs under the entry points of the one for CUDA."""

    def __init__(self, library):
        self.library = library

    def __getattr__(self, name):
        run = getattr(self.library, f"{name.removesuffix('_cuda')}_cpu")
        # The last argument is the stream there and the number of threads here.
        return lambda *arguments: run(*arguments[:-1], torch.get_num_threads())


def replace_native_library() -> None:
    """Let the CUDA ops of csrc/ run their C++ versions on the same memory."""
    from iomm.kernels import native

    real_load, real_launch = native.load, native.launch

    def load(device):
        library, reason = real_load("cpu")
        return (NativeLibrary(library) if device == "cuda" and library else library), reason

    def launch(device, entry, *arguments):
        real_launch(device, entry, *arguments)
        Watch.launched(entry, [], cuda_tensors(arguments))

    native.load, native.launch = load, launch


# ---- kernels of libraries and of Triton ---------------------------------------------------------


def on_host(values):
    """Return host views of the device's tensors, in float32 if they are floating-point."""
    views = [None if t is None else DEVICE.host_view(t.detach()) for t in values]
    return [t.float() if t is not None and t.is_floating_point() else t for t in views]


def on_device(host, dtype=None):
    """Return a copy on the device."""
    out = torch.empty(host.shape, dtype=dtype or host.dtype, device="cuda")
    DEVICE.host_view(out).copy_(host)
    return out


# Keeps the registrations alive.
LIBRARIES = []


def replace_flash_attention() -> None:
    """Let FlashAttention's kernels for ragged batches run the formula, one sample at a time."""

    def samples(q, k, v, offsets, key_offsets, causal, scale):
        """Yield (rows of queries, rows of keys, keys and values of all heads, weights)."""
        repeat = q.shape[1] // k.shape[1]
        bounds = zip(*(pairwise(x.tolist()) for x in (offsets, key_offsets)), strict=True)
        for (first, last), (first_key, last_key) in bounds:
            rows, keys = slice(first, last), slice(first_key, last_key)
            whole = [x[keys].repeat_interleave(repeat, 1) for x in (k, v)]
            scores = torch.einsum("iae,jae->aij", q[rows], whole[0]) * scale
            if causal:
                # The last query sees the last key.
                after = 1 + scores.shape[2] - scores.shape[1]
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(after)
                scores = scores.masked_fill(hidden, float("-inf"))
            yield rows, keys, whole, scores.softmax(-1).nan_to_num()

    def forward(query, key, value, offsets, key_offsets, _, __, ___, causal, *____, **options):
        # The backward pass below needs no sums of exponentials.
        lse = torch.zeros(query.shape[1], query.shape[0], device="cuda")
        unused = [torch.zeros(0, device="cuda") for _ in range(3)]
        if DEVICE.runs_dry(query):
            return torch.empty_like(query), lse, *unused
        q, k, v, *bounds = on_host((query, key, value, offsets, key_offsets))
        out = torch.zeros_like(q)
        for rows, _, (_, values), weights in samples(q, k, v, *bounds, causal, options["scale"]):
            out[rows] = torch.einsum("aij,jae->iae", weights, values)
        return on_device(out, query.dtype), lse, *unused

    def backward(grad, query, key, value, out, lse, offsets, key_offsets, *rest, **options):
        if DEVICE.runs_dry(query):
            return tuple(map(torch.empty_like, (query, key, value)))
        causal = rest[3]
        g, q, k, v, o, *bounds = on_host((grad, query, key, value, out, offsets, key_offsets))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        scale, group = options["scale"], (k.shape[1], -1)
        for rows, keys, (whole_k, whole_v), weights in samples(q, k, v, *bounds, causal, scale):
            delta = (g[rows] * o[rows]).sum(-1).T[..., None]
            d_scores = weights * (torch.einsum("iae,jae->aij", g[rows], whole_v) - delta) * scale
            dq[rows] = torch.einsum("aij,jae->iae", d_scores, whole_k)
            dk[keys] = torch.einsum("aij,iae->jae", d_scores, q[rows]).unflatten(1, group).sum(2)
            dv[keys] = torch.einsum("aij,iae->jae", weights, g[rows]).unflatten(1, group).sum(2)
        return tuple(on_device(x, query.dtype) for x in (dq, dk, dv))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CUDA")
    library.impl("_flash_attention_backward", backward, "CUDA")
    LIBRARIES.append(library)


def replace_triton_ops() -> None:
    """Let the Triton op that is a default on GPUs run its formula."""
    from iomm.kernels import qk_norm_rope as op

    def joint(x, condition):
        """Return a joint tensor as the kernels lay it out, or back."""
        return x if condition is None else x.transpose(0, 1).contiguous()

    def forward(*arguments):
        *tensors, eps = arguments
        if DEVICE.runs_dry(tensors[0]):
            return op._forward._abstract_fn(*arguments)
        host = on_host(tensors)
        outputs = op.qk_norm_rope_reference(*host, eps)
        return tuple(on_device(joint(x, host[5]), tensors[0].dtype) for x in outputs)

    def gradients(grads, x, weights, tables, eps):
        """Return the gradients of a stream's projections and of its weights."""
        parts, sums = [], []
        norms = weights[-1:] if x.shape[2] == 2 else weights
        for g, part, weight in zip(grads, x.unbind(2), norms, strict=False):
            if tables is not None:
                g = op.rotate(g, tables[0], -tables[1])
            rstd = torch.rsqrt(part.square().mean(-1, keepdim=True) + eps)
            normed = part * rstd
            sums.append((g * normed).sum((0, 1, 2)))
            g = g if weight is None else g * weight
            parts.append((g - normed * (g * normed).mean(-1, keepdim=True)) * rstd)
        if len(sums) == 1:
            sums.insert(0, torch.zeros_like(sums[0]))
        return torch.stack([*parts, grads[-1]], dim=2), sums

    def backward(dq, dk, dv, *arguments):
        *tensors, eps = arguments
        if DEVICE.runs_dry(tensors[0]):
            return op._backward._abstract_fn(dq, dk, dv, *arguments)
        x, q_weight, k_weight, cos, sin, first, first_q, first_k = on_host(tensors)
        grads = [joint(g, first) for g in on_host((dq, dk, dv))]
        first_tables, tables = op._split_tables(cos, sin, x.shape[1])
        streams = [(x, (q_weight, k_weight), tables, [g[:, -x.shape[1] :] for g in grads])]
        if first is not None:
            own = [g[:, : first.shape[1]] for g in grads[3 - first.shape[2] :]]
            tables = None if first_tables[0] is None else first_tables
            streams.append((first, (first_q, first_k), tables, own))
        out = []
        for stream, weights, tables, grads in streams:
            dx, sums = gradients(grads, stream, weights, tables, eps)
            out.append(on_device(dx, tensors[0].dtype))
            for total, weight in zip(sums, weights, strict=True):
                rows = torch.zeros(0 if weight is None else op._sums_shape(stream))
                if weight is not None:
                    rows[0] = total.unflatten(0, (-1, 2)).T
                out.append(on_device(rows))
        return tuple(out + [torch.zeros(0, device="cuda") for _ in range(6 - len(out))])

    op._forward._backend_fns["cuda"] = forward
    op._backward._backend_fns["cuda"] = backward


# ---- what the host waits for, and races --------------------------------------------------------


class Access(NamedTuple):
    """The last time that a launch read or wrote a block of memory."""

    what: str
    stream: int
    launch: int
    place: str


class Wait(NamedTuple):
    """A call that returns only when the device has reached it."""

    place: str
    what: str
    # From the innermost one on, with line numbers.
    frames: tuple[str, ...]


# Ops that read the size of their result, or a value, back to the host.
READS_BACK = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::histc",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Watch(TorchDispatchMode):
    """While it is entered, records host waits in `waits` and unordered accesses in `races`.

    A wait is a call after which the host knows that the device has finished: a read of a value or
    of a size, a copy between device and pageable host memory, or a synchronisation with an event or
    stream that was not known to have finished already. torch.compile does not compile under it.

    A race is an access that no order of streams puts after the last one on another stream. The
    memory of a freed block counts as accessed by every later block of its stream.
    """

    active = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.races: Counter[str] = Counter()
        self.reads: dict[int, dict[int, Access]] = {}
        self.writes: dict[int, Access] = {}
        # Per stream: (last use on another stream, newest block at the time of the free).
        self.freed: defaultdict[int, list[tuple[Access, int]]] = defaultdict(list)
        # Calls of ops on the device.
        self.calls = 0
        self.depth = 0
        # Blocks that were freed before do not count.
        DEVICE.take_freed()

    def __enter__(self):
        Watch.active = self
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        # It is entered again inside of the project's own ops.
        self.depth -= 1
        if not self.depth:
            Watch.active = None

    @classmethod
    def waited(cls, what: str) -> None:
        """Record that the host waits here."""
        if cls.active is not None:
            frames = tuple(project_frames())
            place = frames[0].rpartition(":")[0] if frames else "backward pass"
            cls.active.waits.append(Wait(place, what, frames))

    @classmethod
    def launched(cls, what: str, read: list, written: list, stream: int | None = None) -> None:
        """Record a launch that reads and writes these tensors of the device."""
        if cls.active is not None:
            written = {DEVICE.block_number(t) for t in written} - {0}
            read = {DEVICE.block_number(t) for t in read} - written - {0}
            cls.active.check(what, read, written, stream)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema
        if function.namespace == "pretended_cuda":
            return function(*args, **kwargs)
        if self.depth > 1:
            # Ops made of others are not taken apart inside of an own op.
            with self:
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if function.namespace == "iomm" and cuda_tensors((args, kwargs)):
            out = self.run_own_op(schema.name, args, kwargs)
        else:
            out = function(*args, **kwargs)
        if not cuda_tensors((args, kwargs, out)):
            return out
        self.calls += 1
        if what := host_wait(function, args, kwargs, out):
            Watch.waited(what)
            CLOCKS.join(CLOCKS.host, CLOCKS.streams[DEVICE.current_stream()])
        if schema.name != "aten::record_stream":
            read, written = accesses(schema, args, kwargs, out)
            Watch.launched(schema.name, read, written)
        return out

    def run_own_op(self, name, args, kwargs):
        """Run an op of kernels/ so that the calls inside of it are watched as well."""
        from torch._library.custom_ops import OPDEFS

        functions = OPDEFS[name]._backend_fns
        with self:
            return functions.get("cuda", functions.get(None))(*args, **kwargs)

    def check(self, what: str, read: set, written: set, stream: int | None) -> None:
        with CLOCKS.lock:
            self.take_freed()
            stream = DEVICE.current_stream() if stream is None else stream
            access = Access(what, stream, CLOCKS.launch(stream), short_place())
            clock = CLOCKS.streams[stream]
            for block in read | written:
                before = [self.writes[block]] if block in self.writes else []
                if block in written:
                    before += self.reads.get(block, {}).values()
                for last in before:
                    if last.launch > clock.get(last.stream, 0):
                        self.races[describe(access, last)] += 1
            self.check_reuse(access, clock, written)
            for block in read:
                self.reads.setdefault(block, {})[stream] = access
            for block in written:
                self.reads.pop(block, None)
                self.writes[block] = access

    def take_freed(self) -> None:
        """Remember who may still use the blocks that were freed since the last call."""
        freed = DEVICE.take_freed()
        while freed:
            block, owner, newest, count = freed[:4]
            recorded, freed = freed[4 : 4 + count], freed[4 + count :]
            users = list(self.reads.pop(block, {}).values())
            if block in self.writes:
                users.append(self.writes.pop(block))
            # PyTorch keeps what a collective uses until its end.
            safe = {owner, NCCL, *recorded}
            self.freed[owner] += [(user, newest) for user in users if user.stream not in safe]

    def check_reuse(self, access: Access, clock: dict[int, int], written: set) -> None:
        """Check that freed memory, which later blocks of its stream may get, is not in use."""
        in_use = [
            (last, newest)
            for last, newest in self.freed[access.stream]
            if last.launch > clock.get(last.stream, 0)
        ]
        self.freed[access.stream] = in_use
        for last, newest in in_use:
            if any(block > newest for block in written):
                self.races[
                    f"{access.what} on stream {access.stream} ({access.place}) may get memory that "
                    f"{last.what} on stream {last.stream} ({last.place}) still uses: no "
                    "record_stream"
                ] += 1


def describe(access: Access, last: Access) -> str:
    """Return an unordered pair of accesses in words."""
    return (
        f"{access.what} on stream {access.stream} ({access.place}) is not ordered after "
        f"{last.what} on stream {last.stream} ({last.place})"
    )


def accesses(schema, args, kwargs, out) -> tuple[list, list]:
    """Return the tensors that an op reads, and those that it writes. Views do neither."""
    returns = [r.alias_info for r in schema.returns]
    if any(alias is not None and not alias.is_write for alias in returns):
        return [], []
    if schema.name.split("::")[1].startswith(("empty", "new_empty")):
        return [], []
    given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
    read, written = [], cuda_tensors(out)
    for argument in schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        (written if writes else read).extend(cuda_tensors(given.get(argument.name)))
    return read, written


def host_wait(function, args, kwargs, out) -> str | None:
    """Return in words what the host waits for in this call, or None."""
    name = function._schema.name
    if name in READS_BACK:
        return name
    if name == "aten::repeat_interleave":
        known = kwargs.get("output_size") is not None or function._overloadname == "self_int"
        return None if known else f"{name} without output_size"
    if name in INDEXING:
        masks = [t for t in cuda_tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
        return f"{name} by a mask" if masks else None
    # torch.tensor(values, device="cuda").
    if name == "aten::lift_fresh":
        return "copy of Python values to the device"
    if name == "aten::_to_copy":
        source, target = args[0], out
        non_blocking = kwargs.get("non_blocking", False)
    elif name == "aten::copy_":
        target, source = args[:2]
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    else:
        return None
    if source.device == target.device or not source.numel():
        return None
    host = target if source.is_cuda else source
    if non_blocking and host.is_pinned():
        return None
    way = "device to host" if source.is_cuda else "host to device"
    return f"copy {way}{' with pageable memory' if non_blocking else ''}"


@functools.cache
def project_name(filename: str) -> str | None:
    """Return the path of a file of the project or of DeepSpeed, or None for any other."""
    if filename.startswith(f"{ROOT}/"):
        name = filename[len(str(ROOT)) + 1 :]
        return None if name.startswith("tests/") else name
    _, found, name = filename.rpartition("/site-packages/deepspeed/")
    return f"deepspeed/{name}" if found else None


def project_frames():
    """Yield "file:function:line" of the project's and DeepSpeed's frames, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if name := project_name(frame.f_code.co_filename):
            yield f"{name}:{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back


def short_place() -> str:
    """Return the innermost frame of the project or DeepSpeed."""
    return next(project_frames(), "backward pass")
