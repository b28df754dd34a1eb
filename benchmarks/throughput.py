"""How fast a training step is, where its time goes, against plain PyTorch, and what that means for 110 M images.

    python benchmarks/throughput.py                            demo-cpu without a GPU, iomm-b-512 with one
    python benchmarks/throughput.py --against plain            and Algorithm 1 in plain PyTorch (benchmarks/plain.py), in turn
    python benchmarks/throughput.py --config iomm-b-512 --against plain --trace traces --limit-s 480     the one GPU visit
    python benchmarks/throughput.py precision=fp32 train.micro_batch=4           keys of the config, as for a run

Measured is the engine's own step (launch.build, loop.train_step, average, the loss read), all parts of it; one optimizer
step per micro-batch. Hub models give way to random weights of their shape and missing photographs to drawn ones: shapes
and times are real, pictures are not. Rows take turns step by step in one process, in an order that rotates; figures are
medians, ratios are taken within a round, their spread is from the 10th to the 90th percentile. Nothing is timed unless
both sides have the same loss on the same batch, weights and draws. `counted` is the ratio of FLOPs.

Everything goes to benchmarks/results/throughput-<config>-<device>-<date>.json as it is measured, and a PNG beside it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT, ROOT / "benchmarks"     # the script's own folder must not come first: a file in it could hide a module
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() not in OWN)]

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from contextlib import ExitStack, contextmanager, nullcontext  # noqa: E402
from dataclasses import replace  # noqa: E402
from itertools import islice  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.counts import Count, part_flops, plain_flops  # noqa: E402
from benchmarks.loader import draw_photographs  # noqa: E402
from benchmarks.ops import ceilings  # noqa: E402
from benchmarks.plain import Draws, Plain, Trainer  # noqa: E402
from benchmarks.report import label  # noqa: E402
from iomm.adapter import QueryAdapter  # noqa: E402
from iomm.engine import launch, loop, zero  # noqa: E402
from iomm.engine.ahead import Ahead  # noqa: E402
from iomm.engine.config import load_config  # noqa: E402
from iomm.engine.doctor import machine  # noqa: E402
from iomm.engine.metrics import memory_gib, peak_flops  # noqa: E402
from iomm.engine.optim import learning_rate  # noqa: E402
from iomm.engine.plan import make_plan  # noqa: E402
from iomm.engine.tracing import Window  # noqa: E402
from iomm.flow import sample_time  # noqa: E402
from iomm.generator import empty_generator  # noqa: E402
from iomm.kernels import dispatch, fp8_linear  # noqa: E402
from iomm.kernels.masked_attention import masked_attention  # noqa: E402
from iomm.kernels.philox import NOISE, TIME, normal, uniform  # noqa: E402
from iomm.layers import TokenLinear, use_fp8  # noqa: E402
from iomm.masking import visible_mask  # noqa: E402
from iomm.model import IOMM  # noqa: E402
from iomm.ranges import Clock, named  # noqa: E402

STAND_INS = {"OpenGVLab/InternVL3-2B-hf": "random:internvl3-2b", "black-forest-labs/FLUX.1-schnell/vae": "random:flux"}
STAGE_1, STAGE_2 = 110e6, 4.2e6     # images: 11 M x 10 epochs; 210 k pairs x 10 epochs and as many images beside them
PAPER_HOURS, PAPER_RATE = (1000, 50), 110e6 / (1000 * 3600)      # H800-hours of the stages; images/s that the first implies
LIMIT_S = {"cpu": 170, "cuda": 480}
WARM_UP = {"cpu": 1, "cuda": 3}     # rounds of every row that do not count: compiling, attention plans, allocator
SHARES = 0.55, 0.95                 # of the time limit, when the comparison and the ablations end, 3 rounds each at least


def prepare(args, device, folder):
    """(RunConfig as it is measured, [what was changed])."""
    config = load_config(args.config, args.overrides)
    changes = [f"run.dir={folder}", "train.steps=1000000", "data.max_bad_fraction=0"]
    changes += [f"model.{key}={STAND_INS[name]}" for key in ("mllm", "vae")
                if (name := getattr(config.model, key)) in STAND_INS]
    if config.data.shards != "shapes" and not any(item.startswith("data.shards=") for item in args.overrides):
        changes.append(f"data.shards={draw_photographs(folder / 'photographs', 64)}")
    config = load_config(args.config, [*args.overrides, *changes])
    micro_batch = config.train.micro_batch or config.train.global_batch
    if device == "cuda":
        room, wanted = torch.cuda.get_device_properties(0).total_memory * 0.9, micro_batch
        while micro_batch > 1 and needed(config, micro_batch, args.against) > room:
            micro_batch //= 2
        if micro_batch < wanted:
            print(f"micro-batch {micro_batch} and not {wanted}: {needed(config, wanted, args.against) / 2**30:.0f} GiB do not "
                  f"fit into {room / 2**30:.0f}", flush=True)
    changes += [f"train.micro_batch={micro_batch}", f"train.global_batch={micro_batch}"]
    return load_config(args.config, [*args.overrides, *changes]), changes


def needed(config, micro_batch, against):
    """Bytes on one GPU: the run's, an unsharded copy to time parts alone, and plain's weights, gradients, moments and
    average in fp32, with activations half as large again as ours (assumed: autocast keeps norms in fp32)."""
    config = replace(config, train=replace(config.train, global_batch=micro_batch, micro_batch=micro_batch))
    plan = make_plan(config, 1)
    trained = sum(number for part, number in plan.parameters.items() if "frozen" not in part)
    return (sum(plan.memory.values()) + 2 * trained
            + (20 * trained + 0.5 * plan.memory["activations"] if against else 0))


class Bench:
    """Our run and what is measured of it. `deadline(share)` is a moment of time.monotonic()."""

    def __init__(self, config, ranks, limit_s, begun):
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.begun, self.limit_s = begun, limit_s
        launch.prepare_process(config, ranks)
        self.state, self.source, self.flops = launch.build(config, ranks, say=lambda *_: None)
        self.batches = iter(self.source)
        self.model = self.state.sharded.engine.module
        self.compiled = self.device.type == "cuda" if config.train.compile is None else config.train.compile
        self.wake()

    @torch.no_grad()
    def wake(self):
        """Moves all masters away from where they start: there gates and velocity are zero, and multiplying zeros takes a
        GPU less power and time (13 % measured on products)."""
        state, draw = self.state, torch.Generator(self.device).manual_seed(0)
        state.sharded.slots()
        for flat in state.sharded.masters:
            flat.add_(torch.randn(flat.shape, generator=draw, device=self.device), alpha=0.02)
        state.sharded.restored(0)
        for average, flat in zip(state.ema.flats, state.sharded.masters):
            average.copy_(flat)

    def weights(self):
        """Name -> whole fp32 tensor of what trains; one rank holds them all."""
        sharded = self.state.sharded
        return {name: sharded.masters[place.group].detach()[place.offset:place.offset + place.numel].view(sharded.shapes[name])
                for name, place in sharded.places.items()}

    def step(self, batches=None, look_ahead=None):
        """What engine/loop.py does in a step, its log, guard and checkpoints aside."""
        state, config = self.state, self.config
        state.sharded.set_lr(learning_rate(state.step, config.optim, config.train.steps))
        loss, by_time, applied, *_ = loop.train_step(state.sharded, batches or self.next(), look_ahead=look_ahead)
        assert applied, "a step was skipped: its gradient is not finite"
        with named("ema"):
            state.ema.update(state.step)
        state.step += 1
        sums = torch.cat((loss[None], by_time.flatten()))
        dist.all_reduce(sums)
        return sums.tolist()[0]

    def next(self):
        return list(islice(self.batches, self.source.accumulation_steps))

    def deadline(self, share):
        return self.begun + share * self.limit_s

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def in_turn(self, rows, rounds, deadline, warm_up=None):
        """{row: [seconds]}: every row once a round, in an order that rotates; at least 3 rounds, then until `deadline`.
        `cpu_s` then holds the CPU time of the same, over all threads: what says something where others compute too."""
        warm_up = WARM_UP[self.device.type] if warm_up is None else warm_up
        times, names = {name: [] for name in rows}, list(rows)
        self.cpu_s = {name: [] for name in rows}
        for r in range(warm_up + rounds):
            if r >= warm_up + 3 and time.monotonic() > deadline:
                break
            for name in names[r % len(names):] + names[:r % len(names)]:
                self.wait()
                started, started_cpu = time.perf_counter(), time.process_time()
                rows[name]()
                self.wait()
                if r >= warm_up:
                    times[name].append(time.perf_counter() - started)
                    self.cpu_s[name].append(time.process_time() - started_cpu)
        return times

    def split(self, num_steps):
        """{part: median seconds} within the step, on the device's own timeline."""
        clock, found = Clock(self.device), []
        with clock:
            for _ in range(num_steps):
                self.step()
                found.append(clock.read()[0])
        return {part: statistics.median(row.get(part, 0.0) for row in found) for part in sorted(set().union(*found))}


def summary(seconds, batch):
    return {"steps": len(seconds), "s": statistics.median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds),
            "images_per_s": batch / statistics.median(seconds)}


def ratio(over, under):
    """Median, 10th and 90th percentile of over / under, round by round."""
    found = sorted(a / b for a, b in zip(over, under))
    return {"median": statistics.median(found), "low": found[round(0.1 * (len(found) - 1))],
            "high": found[round(0.9 * (len(found) - 1))]}


# The rival

def make_plain(bench):
    """Plain and its Trainer with our weights, once its loss on a batch is ours."""
    config, model = bench.config, bench.model
    mllm, vae = model.frozen
    plain = Plain(model.generator.config, config.adapter, mllm, vae, ratio=config.mask.ratio,
                  autocast=config.precision != "fp32").to(bench.device)
    plain.load(bench.weights())
    (batch, *_), twin = bench.next(), whole_copy(bench)
    n_B, seed, (rows, columns) = batch.n_B.to(bench.device), config.run.seed, (
        side // vae.factor for side in batch.pixels_BCHW.shape[-2:])
    draws = Draws(visible_BP=visible_mask(config.mask, seed, n_B, mllm.num_image_tokens).view(len(n_B), -1),
                  t_B=sample_time(uniform(seed, TIME, n_B, 1)[:, 0]), noise_BCHW=normal(
                      seed, NOISE, n_B, vae.channels * rows * columns).view(-1, vae.channels, rows, columns))
    with torch.no_grad():
        ours = twin(batch.pixels_BCHW, batch.vit_pixels_BCHW, batch.n_B)[0].item()
        theirs = plain.loss(batch.pixels_BCHW, batch.vit_pixels_BCHW, draws).item()
    allowed = 1e-4 if config.precision == "fp32" else 2e-2
    print(f"loss on one batch: ours {ours:.6f}, plain {theirs:.6f}", flush=True)
    if not abs(ours - theirs) <= allowed * ours:
        raise SystemExit(f"the losses differ by more than {allowed:.0e} of themselves: nothing is timed")
    if bench.compiled:
        plain.compile_blocks()
    return plain, Trainer(plain, config.optim, config.ema.decay), {"ours": ours, "plain": theirs}


def whole_copy(bench):
    """An IOMM with our weights that no ZeRO cuts up, for what is run alone; its frozen parts are the same modules."""
    config, model = bench.config, bench.model
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    mllm, vae = model.frozen
    with torch.device(bench.device):
        adapter = QueryAdapter(config.adapter, mllm.width)
    twin = IOMM(empty_generator(model.generator.config, device=bench.device), adapter, mllm, vae, model.recipe).to(dtype)
    twin.load_state_dict(bench.weights())
    return twin


def against(bench, args, result):
    """Times ours and plain in turn; fills result["against"]."""
    plain, trainer, result["loss"] = make_plain(bench)
    result["flops_per_image"]["plain"] = plain_flops(bench.config)
    result["flops_per_image"]["plain, all outputs"] = plain_flops(bench.config, every=True)

    def plain_step(every=False, compiled=True):
        with swapped(plain, every=every), nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            return trainer.step(bench.next()).mean().item()
    rows = {"ours": bench.step, "plain": plain_step, "plain, all outputs": lambda: plain_step(every=True)}
    if bench.compiled:
        rows["plain, no compile"] = lambda: plain_step(compiled=False)
    return bench.in_turn(rows, args.steps, bench.deadline(SHARES[0]))


# Each part alone

def parts_alone(bench):
    """{part: (seconds, FLOPs an image or None, bytes that eager ops read and write)}, each run by itself."""
    twin, (batch, *_) = whole_copy(bench), bench.next()
    mllm, vae = twin.frozen
    if bench.compiled:
        for block in twin.generator.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    pixels, vit_pixels, n_B = batch.pixels_BCHW, batch.vit_pixels_BCHW, batch.n_B.to(bench.device)
    condition = twin.condition(vit_pixels, n_B)
    cache, _ = mllm.prefix(condition)
    queries = twin.adapter(condition).detach().to(mllm.dtype).requires_grad_()
    with torch.no_grad():
        hidden = mllm.queries(queries, condition, cache)
    latents = twin.encode(pixels, n_B)
    size = vae.grid(*pixels.shape[-2:])
    noisy = torch.randn(len(n_B), size[0] * size[1], vae.token_dim, device=bench.device)
    t_B = torch.rand(len(n_B), device=bench.device)
    sharded, optimizer = bench.state.sharded, bench.state.sharded.optimizer
    gradients = [torch.randn_like(flat) * 1e-3 for flat in sharded.masters]

    def optimize():
        sharded.set_lr(0.0)
        for flat, kind, gradient in zip(sharded.masters, sharded.kinds, gradients):
            before, flat.grad = flat.grad, gradient
            group = next(g for g in optimizer.param_groups if g["kind"] == kind)
            with torch.no_grad():
                (optimizer.adamw_step if kind == "adamw" else optimizer.muon_step)(flat, optimizer.state[flat], group)
            flat.grad = before

    def backward(out):
        out.backward(torch.ones_like(out))
    work = {"data": lambda: bench.next(), "vae": lambda: twin.encode(pixels, n_B), "vit": lambda: mllm.image_tokens(vit_pixels),
            "adapter": lambda: backward(twin.adapter(condition)), "prefix": lambda: mllm.prefix(condition),
            "suffix": lambda: backward(mllm.queries(queries, condition, cache)),
            "generator": lambda: backward(twin.velocity(noisy, t_B, hidden, None, size)),
            "optimizer": optimize, "ema": lambda: bench.state.ema.update(0)}
    flops, found = part_flops(twin, bench.config.data.size_px), {}
    assert latents.shape[-1] // vae.patch == size[1]
    for name, run in work.items():
        seconds = bench.in_turn({name: run}, 20, time.monotonic() + bench.limit_s / 80)[name]
        with torch.compiler.set_stance("force_eager"), Count() as counter:
            run()
        found[name] = {"s": statistics.median(seconds), "flops": flops.get(name), "bytes": counter.bytes}
    return found


# Each idea switched off

@contextmanager
def swapped(thing, **values):
    """Attributes of a thing, other ones for a while."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextmanager
def bodies(choice):
    """IOMM_KERNELS, another one for a while."""
    before = os.environ.pop("IOMM_KERNELS", None)
    os.environ["IOMM_KERNELS"] = choice
    try:
        yield
    finally:
        del os.environ["IOMM_KERNELS"]
        if before is not None:
            os.environ["IOMM_KERNELS"] = before


@contextmanager
def in_fp8(generator):
    """The generator's products in fp8 for a while; torch.compile makes graphs of that too, in the first step."""
    use_fp8(generator)
    try:
        yield
    finally:
        for part in generator.modules():
            if isinstance(part, TokenLinear):
                part.fp8 = False


def whole_pass(mllm, queries_BQD, condition, cache, *, causal=True):
    """Like MLLM.queries, without the prefix split: prompt, image tokens and queries in one pass with ordinary autograd."""
    decoder, (batch, num, width) = mllm.backbone.language_model, queries_BQD.shape
    bounds, device = condition.offsets.tolist(), queries_BQD.device
    steps = torch.arange(num, device=device)
    tokens, positions, is_query = [], [], []
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        tokens += [condition.tokens_TD[start:stop], queries_BQD[b]]
        positions += [condition.positions_T[start:stop], condition.end_B[b] + steps]
        is_query += [torch.zeros(stop - start, dtype=torch.bool), torch.ones(num, dtype=torch.bool)]
    x_SD, rotary = torch.cat(tokens), decoder.rotary_emb(queries_BQD, torch.cat(positions)[None])
    offsets = condition.offsets + num * torch.arange(batch + 1, dtype=torch.int32, device=device)
    for layer in decoder.layers:
        q, k, v = mllm.heads(layer, x_SD, rotary)
        x_SD = mllm.finish(layer, x_SD, masked_attention(q, k, v, offsets, causal=causal))
    return decoder.norm(x_SD)[torch.cat(is_query).to(device)].view(batch, num, width)


def ablations(bench):
    """{row: step with one idea switched off}, and {row: step with something switched on that is not by default}."""
    model, mllm, recipe = bench.model, bench.model.frozen[0], bench.model.recipe
    rows = {"hidden tokens enter as zeros (mask.mode=zero)": lambda: [
                swapped(model, recipe=replace(recipe, mask=replace(recipe.mask, mode="zero")))],
            "no prefix split": lambda: [swapped(mllm, prefix=lambda condition, outputs=False: (None, None),
                                                queries=lambda *args, **kind: whole_pass(mllm, *args, **kind))],
            "all outputs condition (adapter.conditions=all)": lambda: [
                swapped(model, recipe=replace(recipe, adapter=replace(recipe.adapter, conditions="all")))]}
    own = [f"{op}:reference" for op, _, body, _ in dispatch.table(bench.device) if body in ("cpp", "cuda")]
    if own:
        rows["no compiled ops of ours"] = lambda: [bodies(",".join(own))]
    if bench.compiled:
        rows["no torch.compile"] = lambda: [torch.compiler.set_stance("force_eager")]
    if bench.device.type == "cuda":
        for body in ("triton", "varlen"):
            if dict(refusals("masked_attention", bench.device)).get(body, "unknown") is None:
                rows[f"masked_attention by {body}"] = lambda body=body: [bodies(f"masked_attention:{body}")]

        if fp8_linear.why_not() is None:
            rows["fp8 in the generator's blocks (precision=fp8)"] = lambda: [in_fp8(model.generator)]

    def inside(contexts):
        def run():
            with ExitStack() as stack:
                for context in contexts():
                    stack.enter_context(context)
                return bench.step()
        return run
    steps = {name: inside(contexts) for name, contexts in rows.items()}
    if bench.device.type == "cuda":
        ahead = Ahead(bench.batches, model.prepare, bench.device)
        steps["encoded ahead on a stream of its own (train.overlap)"] = lambda: bench.step(
            list(islice(ahead, bench.source.accumulation_steps)), ahead.fetch)
    held = bench.next()
    ready = [replace(batch, latents_BCHW=model.encode(batch.pixels_BCHW, batch.n_B.to(bench.device)).float(), pixels_BCHW=None)
             for batch in held]
    steps["latents at hand (data.latents, without its reads)"] = lambda: bench.step(ready)
    return steps


def refusals(op, device):
    """[(body, why it cannot run here, or None)]."""
    return [(body.name, body.refusal(device.type, torch.bfloat16)) for body in dispatch._bodies[op]]


# What is said of it

def table(result):
    batch, step_s = result["images_a_step"], result["rows"]["ours"]["s"]
    rate, bandwidth = result["matmul_flop_per_s"], result["copy_bytes_per_s"]
    split = result["split_s"]
    total = sum(split.values())
    lines = ["within the step        ms   share"]
    lines += [f"{part:<18} {1e3 * s:>6.1f}  {s / total:>5.1%}" for part, s in sorted(split.items(), key=lambda pair: -pair[1])]
    lines += ["", "alone                  ms   of step   TFLOP/s   of matmul      GB/s   of copy (bytes of eager ops)"]
    for part, row in result["parts"].items():
        flops = batch * (row["flops"] or 0) / row["s"]
        moved = row["bytes"] / row["s"]
        work = f"{flops / 1e12:>9.3f}   {flops / rate:>9.1%}" if flops else f"{'':>21}"
        lines.append(f"{part:<18} {1e3 * row['s']:>6.1f}   {row['s'] / step_s:>7.1%} {work} {moved / 1e9:>9.1f}   {moved / bandwidth:>7.1%}")
    return "\n".join(lines)


def projection(result):
    """GPU-hours of both stages at the measured rate; the paper's beside them."""
    rate = result["rows"]["ours"]["images_per_s"]
    hours = [images / rate / 3600 for images in (STAGE_1, STAGE_2)]
    result["projection"] = {"stage_1_gpu_hours": hours[0], "stage_2_gpu_hours": hours[1], "paper_gpu_hours": PAPER_HOURS,
                            "paper_images_per_s": PAPER_RATE}
    return (f"stage 1, {STAGE_1 / 1e6:.0f} M images: {hours[0]:,.0f} GPU-hours (paper: {PAPER_HOURS[0]:,} on H800); stage 2, "
            f"{STAGE_2 / 1e6:.1f} M: {hours[1]:,.1f} (paper: {PAPER_HOURS[1]}); {rate:.1f} images/s per GPU (paper: {PAPER_RATE:.1f})")


def picture(result, path):
    """Bars of the time split beside plain's steps, and the roofline, as a PNG."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print('no PNG: matplotlib is missing (pip install -e ".[bench]")')
        return
    figure, (bars, roof) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.2))
    scale = result["rows"]["ours"]["s"] / sum(result["split_s"].values())      # the clock's own steps were others
    left = 0.0
    for i, (part, seconds) in enumerate(sorted(result["split_s"].items(), key=lambda pair: -pair[1])):
        bars.bar("ours", seconds * scale, bottom=left, label=part, color=plt.get_cmap("tab20")(i))
        left += seconds * scale
    for name, row in result["rows"].items():
        if name != "ours":
            bars.bar(name.replace(", ", "\n"), row["s"], color="0.6")
    bars.set_ylabel("seconds a step")
    bars.legend(fontsize=8)
    rate, bandwidth = result["matmul_flop_per_s"], result["copy_bytes_per_s"]
    ridge, batch = rate / bandwidth, result["images_a_step"]
    roof.loglog([ridge / 100, ridge, ridge * 30], [rate / 100, rate, rate], color="0.5")
    for part, row in result["parts"].items():
        if row["flops"]:
            flops = batch * row["flops"]
            roof.loglog(flops / row["bytes"], flops / row["s"], "o", label=part)
    roof.legend(fontsize=8)
    roof.set_xlabel("FLOP per byte that eager ops read and write")
    roof.set_ylabel("FLOP/s")
    figure.suptitle(f"{result['config']}, {result['images_a_step']} images a step, {result['machine']['device']}, "
                    f"{result['machine']['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def measure(bench, args, result, save):
    """Fills `result`, saving as it goes, and prints."""
    batch = result["images_a_step"]
    if args.against:
        times = against(bench, args, result)
    else:
        times = bench.in_turn({"ours": bench.step}, args.steps, bench.deadline(SHARES[0]))
    result["seconds"], result["cpu_s"] = times, bench.cpu_s
    result["rows"] = {name: summary(seconds, batch) for name, seconds in times.items()}
    result["peak_memory_gib"] = memory_gib(bench.device)
    result["ratios"] = {name: ratio(times[name], times["ours"]) for name in times if name != "ours"}
    for name, found in result["ratios"].items():
        work = name if name in result["flops_per_image"] else "plain"
        found["counted"] = result["flops_per_image"][work] / bench.flops
        found["cpu_time"] = ratio(bench.cpu_s[name], bench.cpu_s["ours"])["median"]
    images_per_s = result["rows"]["ours"]["images_per_s"]
    peak, result["of_matmul_rate"] = peak_flops(bench.device), bench.flops * images_per_s / result["matmul_flop_per_s"]
    result["mfu"] = bench.flops * images_per_s / peak if peak else None
    save()
    for name, row in result["rows"].items():
        print(f"{name:<20} {row['s'] * 1e3:>8.1f} ms a step of {batch} images, {row['images_per_s']:.2f} images/s "
              f"({row['steps']} steps, {row['fastest_s'] * 1e3:.0f} to {row['slowest_s'] * 1e3:.0f} ms)", flush=True)
    result["split_s"] = bench.split(5)
    result["parts"] = parts_alone(bench)
    save()
    print("\n" + table(result))
    print(f"\n{images_per_s:.2f} images/s, {bench.flops / 1e12:.3f} TFLOP an image: {result['of_matmul_rate']:.1%} of the measured matmul "
          f"rate ({result['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s), mfu {'%.1f %%' % (100 * result['mfu']) if peak else 'unknown: no peak'}"
          f", peak memory {result['peak_memory_gib']:.1f} GiB")
    print(projection(result) if peak else "no projection: this is not the real shape on a GPU whose peak is known", flush=True)
    rows = {} if args.no_ablations else {"ours": bench.step, **ablations(bench)}
    least_s = (WARM_UP[bench.device.type] + 3) * len(rows) * result["rows"]["ours"]["s"]
    if rows and time.monotonic() + least_s > bench.deadline(1.1):
        print(f"no ablations: they take {least_s:.0f} s more; give --limit-s {time.monotonic() - bench.begun + least_s:.0f} for them")
    elif rows:
        found = bench.in_turn(rows, max(4, args.steps // 3), bench.deadline(SHARES[1]))
        result["ablations"] = {name: ratio(seconds, found["ours"]) for name, seconds in found.items() if name != "ours"}
        save()
        print("\nour step with one thing changed, its time over ours")
        for name, row in result["ablations"].items():
            print(f"{name:<52} {row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f})", flush=True)
    if args.trace and time.monotonic() > bench.deadline(1.0):
        print("no trace: the time is up; repeat with --no-ablations")
    elif args.trace:
        window = Window("torch", bench.state.step + 1, 10, args.trace, bench.ranks)
        for _ in range(10):
            window.before(bench.state.step + 1)
            bench.step()
            window.after(bench.state.step)


def main():
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="iomm-b-512" if device == "cuda" else "demo-cpu")
    parser.add_argument("--against", choices=("plain",))
    parser.add_argument("--steps", type=int, default=40, help="rounds at most")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S[device], help="about so many seconds in all; what does not fit is left out")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--trace", help="folder for a torch trace of ten steps")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config, changes = prepare(args, device, Path(folder))
        bench = Bench(config, zero.start(600), args.limit_s, begun)
        try:
            report(bench, args, changes)
        finally:
            bench.batches.close()
            zero.stop()


def report(bench, args, changes):
    facts, device = machine(), bench.device.type
    copy, matmul = ceilings(bench.device, torch.float32 if bench.config.precision == "fp32" else torch.bfloat16)      # as it is idle
    path = ROOT / "benchmarks/results" / f"{label(f'throughput-{Path(args.config).stem}', args.overrides)}-{device}-{facts['date']}.json"
    result = {"machine": facts | {"load": os.getloadavg()[0], "threads": torch.get_num_threads()}, "config": args.config,
              "changed": [*args.overrides, *changes], "precision": bench.config.precision, "compiled": bench.compiled,
              "images_a_step": bench.config.train.global_batch, "copy_bytes_per_s": copy, "matmul_flop_per_s": matmul,
              "flops_per_image": {"ours": bench.flops}, "build_s": time.monotonic() - bench.begun}

    def save():
        result["wall_s"] = time.monotonic() - bench.begun
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    measure(bench, args, result, save)
    picture(result, path.with_suffix(".png"))
    print(f"{result['wall_s']:.0f} s; written to {path}")
    if args.against:
        everything, same = result["ratios"]["plain, all outputs"], result["ratios"]["plain"]
        print(f"against all outputs as condition {line(everything)}")
        if device == "cpu":
            print(f"by CPU time over all threads: {same['cpu_time']:.2f}, all outputs {everything['cpu_time']:.2f}")
        print(line(same), flush=True)


def line(found):
    return f"ratio {found['median']:.2f} (counted {found['counted']:.2f}, spread {found['low']:.2f}-{found['high']:.2f})"


if __name__ == "__main__":
    main()
