"""Count the work of a step, in numbers that do not depend on the machine.

    python benchmarks/lib/counts.py [--write]

    work        FLOPs of one image by part, at the real shapes, for our model and the baseline;
                bytes that autograd keeps
    step        aten calls (without views), bytes that they read and write, new tensors and FLOPs of
                one training step of demo-cpu on two images, in eager mode on a CPU, by part; and
                the graph breaks of a generator's blocks
    full size   bytes on the device, calls of ops, and launches, graphs and spills of torch.compile
                in a step of the published configs; recorded by tests/rehearsal/rehearse.py, which
                needs minutes for each

benchmarks/lib/counts.json holds these counts, and tests/benchmarks/test_counts.py compares them
exactly. --write rewrites the file; a change that moves the counts commits the new ones. The counts
of a step are valid for one version of torch, which the file names.
"""

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.baseline import BaselineModel
from iomm.config import PRESETS, RECONSTRUCT
from iomm.engine import dry_run
from iomm.engine.builders import mllm_name, vae_name
from iomm.engine.config import RunConfig, load_config
from iomm.flops import flops_per_image
from iomm.internvl import mllm_without_weights, prompt_tokenizer
from iomm.mllm import IMAGE, TURN
from iomm.model import IOMM
from iomm.vae import vae_without_weights

FILE = ROOT / "benchmarks/lib/counts.json"
# The paper's stage 1 of IOMM-B: images of the dataset, epochs by its table 1 and by its table 9
# (with the same score in both), and H800 GPU-hours.
PAPER_IMAGES, PAPER_EPOCHS, PAPER_HOURS = 11e6, (10, 5), 1000
# Ops that write a tensor without reading it.
WRITE_ONLY = "aten::copy_", "aten::zero_", "aten::fill_"


def paper_rate(epochs: int) -> float:
    """Return the images/s per GPU that the paper's hours imply for a stage 1 of so many epochs."""
    return epochs * PAPER_IMAGES / (PAPER_HOURS * 3600)


class Count(TorchDispatchMode):
    """Counts what runs inside the context.

    `calls` are calls of aten and our own ops except views, `bytes` what they read and write, and
    `tensors` how many new tensors they make. Code of torch.compile is invisible to this mode, so
    count in eager mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = self.tensors = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        writes, written = func._schema.is_mutable, []
        # Gradients count as only read: AdamW scales them in place only on request.
        if writes:
            arguments = func._schema.arguments
            # Arguments after the last positional one are in kwargs, or have their default.
            values = dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
            written = [
                values.get(a.name)
                for a in arguments
                if a.alias_info is not None and a.alias_info.is_write and a.name != "grads"
            ]
        if new or writes or not made:
            self.calls += 1
            self.tensors += len(new)
            self.bytes += size(given) + (size([written, new]) if writes else size(made))
            self.bytes -= size(written) if func._schema.name in WRITE_ONLY else 0
        return out


def size(tree: Any) -> int:
    """Return the bytes of all tensors in a tree."""
    return sum(
        x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)
    )


def baseline_flops(config: RunConfig, every: bool = False) -> int:
    """Return the FLOPs of one image in the baseline, forward and backward.

    Counted on the meta device. every: with all outputs as condition.
    """
    mllm, vae = (
        mllm_without_weights(mllm_name(config)),
        vae_without_weights(vae_name(config), config.model.patch),
    )
    mllm.tokenizer = prompt_tokenizer()
    preset = PRESETS[config.model.preset]
    shape = replace(preset, token_dim=vae.token_dim, condition_dim=mllm.width)
    size = config.data.size_px
    with torch.device("meta"):
        baseline = BaselineModel(
            shape, config.adapter, mllm, vae, ratio=config.mask.ratio, every=every
        )
        # The counter does not know the fused attention of some devices; the math backend consists
        # of two products, which it does know.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            baseline.loss(
                torch.empty(1, 3, size, size), torch.empty(1, 3, mllm.vit_px, mllm.vit_px)
            ).backward()
    return counter.get_total_flops()


def part_flops(model: IOMM, size_px: int) -> dict[str, float]:
    """Return {part: FLOPs of one image}, forward and, where it has one, backward.

    The model's MLLM must have a tokenizer.
    """
    mllm, vae = model.frozen
    adapter, text = (
        model.recipe.adapter,
        len(mllm.token_ids("".join(TURN) + "".join(IMAGE) + RECONSTRUCT)),
    )
    num_prefix = text + mllm.num_image_tokens * (1 - model.recipe.mask.ratio)
    prefix, forward, backward = mllm.decoder_flops(num_prefix, adapter.num_queries)
    generator = model.generator.flops_per_image(vae.grid(size_px, size_px), adapter.num_queries)
    return {
        "vae": vae.flops_per_image(size_px),
        "vit": mllm.vit_flops(),
        "adapter": 3 * model.adapter.flops(num_prefix),
        "prefix": prefix,
        "suffix": forward + backward,
        "generator": 3 * generator,
    }


def counted(name: str) -> RunConfig:
    """Load a config to count; in float32 if it leaves the precision to the machine."""
    overrides = ["data.shards=shapes"]
    if name == "demo-cpu":
        overrides.append("precision=fp32")
    return load_config(name, overrides)


def work(name: str) -> dict:
    """Return the work for one image of a config.

    FLOPs by part and of the baseline, and the bytes that autograd keeps for the generator.
    """
    config = counted(name)
    model = dry_run.build_without_weights(config)
    model.frozen[0].tokenizer = prompt_tokenizer()
    ours = flops_per_image(model, config.data.size_px)
    found = {
        "flops": {
            part: round(flops) for part, flops in part_flops(model, config.data.size_px).items()
        },
        "activation_bytes": dry_run.activation_bytes(model, config, 1),
    }
    for row, every in (("baseline", False), ("baseline, all outputs", True)):
        found[row] = {"flops": baseline_flops(config, every)}
        found[row]["ratio"] = round(found[row]["flops"] / ours, 4)
    return found


def step_counts() -> dict:
    """Return the counts of a step of demo-cpu on two images by part, in eager mode.

    Loader and ranks are not included.
    """
    from iomm.engine import builders
    from iomm.engine.parallel.optim import make_optimizer

    config = counted("demo-cpu")
    model = builders.build_model(config, "cpu")
    mllm, _ = model.frozen
    draw = torch.Generator().manual_seed(0)
    size, batch = config.data.size_px, 2
    pixels = torch.rand(batch, 3, size, size, generator=draw) * 2 - 1
    vit_pixels, n_B = (
        torch.randn(batch, 3, mllm.vit_px, mllm.vit_px, generator=draw),
        torch.arange(batch),
    )
    optimizer = make_optimizer(model, config.optim)
    found = {}

    def count(part: str, work: Callable[[], Any]) -> Any:
        with Count() as counter:
            result = work()
        found[part] = {"calls": counter.calls, "bytes": counter.bytes, "tensors": counter.tensors}
        return result

    # Attention plans are made in this pass, which is not counted by part.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(pixels, vit_pixels, n_B)[0].backward()
    found["flops"] = flops.get_total_flops()
    optimizer.step()
    optimizer.zero_grad()
    count("vae", lambda: model.encode(pixels, n_B))
    condition = count("vit and condition", lambda: model.condition(vit_pixels, n_B))
    count("adapter and MLLM", lambda: model.encode_condition(condition))
    loss = count("forward", lambda: model(pixels, vit_pixels, n_B))[0]
    count("backward", loss.backward)
    count("optimizer", optimizer.step)
    return found


def graph_breaks() -> int:
    """Return the graph breaks of a generator's blocks.

    With torch.compile(fullgraph=True) this is 0, or the call raises.
    """
    from torch._dynamo.utils import counters

    from iomm.config import GeneratorConfig
    from iomm.generator import new_generator

    generator = new_generator(
        GeneratorConfig(width=64, num_heads=2, num_blocks=2, token_dim=16, condition_dim=32), 0
    )
    counters.clear()
    for block in generator.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    generator(torch.randn(2, 16, 16), torch.rand(2), torch.randn(2, 8, 32), (4, 4)).sum().backward()
    return sum(counters["graph_break"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.relative_to(ROOT)}")
    args = parser.parse_args()
    found = {
        "work": {name: work(name) for name in ("demo-cpu", "iomm-b-512")},
        "step": {
            "torch": torch.__version__.partition("+")[0],
            "demo-cpu": step_counts(),
            "graph_breaks": graph_breaks(),
        },
    }
    found["full size"] = json.loads(FILE.read_text())["full size"]
    text = json.dumps(found, indent=1) + "\n"
    if args.write:
        FILE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
