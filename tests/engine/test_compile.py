"""torch.compile of the frozen parts and the blocks: whole graphs, few of them, the same numbers."""

import json

import pytest
import torch
from kernel_checks import assert_no_worse
from launches import finish, start_processes
from torch._dynamo.utils import counters
from toy_models import TEXT, VISION, autoencoder

from iomm.config import RECONSTRUCT
from iomm.engine.shapes.mllm import create_mllm
from iomm.internvl import load_mllm
from iomm.vae import FluxVAE

Q = 7
# Decoder layers: more than there are graphs of each half.
LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return create_mllm(
        tmp_path_factory.mktemp("mllm") / "tiny",
        texts=[RECONSTRUCT],
        vision=VISION,
        text={**TEXT, "num_hidden_layers": LAYERS},
    )


@pytest.fixture(autouse=True)
def fresh_counts():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def read(mllm, batch, seed, dtype=torch.float32):
    """Return image tokens, outputs of queries behind a ragged prefix, and their gradient."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    tokens_BPD, queries_BQD = (
        mllm.image_tokens(draw(batch, 3, 32, 32)),
        draw(batch, Q, mllm.width).requires_grad_(),
    )
    visible = torch.rand(batch * mllm.num_image_tokens, generator=random) < 0.4
    condition = mllm.condition([RECONSTRUCT] * batch, tokens_BPD, visible=visible)
    hidden_BQD = mllm.queries(queries_BQD, condition, mllm.prefix(condition)[0])
    return (
        tokens_BPD,
        hidden_BQD.detach(),
        torch.autograd.grad(hidden_BQD.square().sum(), queries_BQD)[0],
    )


def pixels(batch, height, width, dtype=torch.float32):
    random = torch.Generator().manual_seed(height)
    return (torch.rand(batch, 3, height, width, generator=random, dtype=torch.float64) * 2 - 1).to(
        dtype
    )


def test_mllm_graphs_are_shared_by_ragged_batches(folder):
    """One graph of the ViT's layers, one of the prefix's, three and two of the queries' halves.

    `project_qkv` has one graph for the prefix's last layer, which has no queries, and two with
    gradient, since the first layer's input is a view of the queries. `finish_layer` has two.
    """
    mllm = load_mllm(str(folder), dtype=torch.float32)
    mllm.compile_parts(backend="eager")
    expected = [read(load_mllm(str(folder), dtype=torch.float32), 3, seed) for seed in range(4)]
    for seed, wanted in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(read(mllm, 3, seed), wanted, strict=True))
        assert graphs() == 1 + 1 + 3 + 2
    # A stage-2 batch holds any number of images. The ViT layer is traced once more for all of them.
    read(mllm, 5, 4)
    read(mllm, 4, 5)
    assert graphs() == 1 + 1 + 3 + 2 + 1 and not counters["graph_break"]


def test_vae_encoder_graphs_are_shared_by_buckets():
    vae, compiled = (FluxVAE(autoencoder(widths=(8, 8))) for _ in range(2))
    compiled.compile_parts(backend="eager")
    for height, width in ((48, 32), (32, 48), (64, 32), (48, 48)):
        image = pixels(2, height, width)
        assert torch.equal(compiled.encode(image), vae.encode(image))
    # One graph for the first size and one for all others.
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_frozen_parts_are_as_exact_as_eager(folder, dtype):
    exact, eager, compiled = (
        load_mllm(str(folder), dtype=d) for d in (torch.float64, dtype, dtype)
    )
    compiled.compile_parts()
    for batch, seed in ((3, 0), (3, 1)):
        rows = zip(
            read(compiled, batch, seed, dtype),
            read(eager, batch, seed, dtype),
            read(exact, batch, seed, torch.float64),
            strict=True,
        )
        for got, same_dtype, wanted in rows:
            assert_no_worse(got, same_dtype, wanted)
    exact, eager, compiled = (FluxVAE(autoencoder().to(d)) for d in (torch.float64, dtype, dtype))
    compiled.compile_parts()
    got, same_dtype, wanted = (
        vae.encode(pixels(2, 32, 32, d))
        for vae, d in ((compiled, dtype), (eager, dtype), (exact, torch.float64))
    )
    assert_no_worse(got, same_dtype, wanted)


KEPT = """
import json, sys
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from iomm.engine import launch
from iomm.engine.parallel import ranks as group
from iomm.engine.config import load_config
config, ranks = load_config("tests/helpers/pixels.yaml", sys.argv[2:]), group.start(200)
launch.prepare_process(config, ranks)
state, source, _ = launch.build(config, ranks)
module, gathered = state.sharded.engine.module, []

def look(block, inputs):
    matrices = [p for p in block.parameters() if p.ndim == 2]
    gathered.extend((StorageWeakRef(p.data.untyped_storage()), p.numel()) for p in matrices)
for step, batch in enumerate(source):
    # The first step is left out: it also traces what it gathers.
    for block in module.modules() if step else ():
        if isinstance(block, module.leaves):
            block.register_forward_pre_hook(look)
    loss, *_ = state.sharded(*batch.inputs)
    alive = sum(numel for storage, numel in gathered if not storage.expired())
    state.sharded.backward(loss)
    state.sharded.step()
if ranks.first:
    open(sys.argv[1], "w").write(json.dumps([alive, sum(numel for _, numel in gathered)]))
group.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_zero_3_frees_gathered_weights_of_compiled_blocks(compiled, tmp_path):
    """Without DeepSpeed's own linear, as on a GPU.

    Eager blocks keep every weight, which shows that the test can see them.
    """
    (tmp_path / "kept.py").write_text(KEPT)
    with open(tmp_path / "output.txt", "w") as output:
        codes = finish(
            start_processes(
                2,
                tmp_path / "kept.py",
                str(tmp_path / "kept.json"),
                f"run.dir={tmp_path / 'run'}",
                "zero.stage=3",
                "zero.max_live_parameters=1",
                "zero.prefetch_bucket_size=1",
                "data.num_images=64",
                "precision=fp32",
                "train.global_batch=4",
                "train.steps=2",
                f"train.compile={str(compiled).lower()}",
                output=output,
            )
        )
    assert not any(codes), (tmp_path / "output.txt").read_text()[-4000:]
    alive, gathered = json.loads((tmp_path / "kept.json").read_text())
    assert gathered > 1e6 and alive == (0 if compiled else gathered)
