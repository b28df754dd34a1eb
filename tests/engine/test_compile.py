"""What torch.compile makes of the frozen parts: whole graphs, as many over ragged batches as at first, the same numbers."""

import json

import pytest
import torch
from kernel_checks import assert_no_worse
from launches import finish, start_ranks
from torch._dynamo.utils import counters
from toy_models import TEXT, VISION, autoencoder

from iomm.engine.shapes.mllm import create_mllm
from iomm.internvl import load_mllm
from iomm.mllm import RECONSTRUCT
from iomm.vae import FluxVAE

Q = 7
# Of the decoder: more than there are graphs of each half.
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
    """Image tokens, queries behind a ragged prefix, and their gradient, of random images."""
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


def test_ragged_prefixes_and_other_layers_need_no_graphs_of_their_own(folder):
    """One graph a ViT layer; of `project_qkv` one in the prefix, its last layer's without queries, and two with gradient (the
    first layer's input is a view of the queries); of `finish_layer` one without and two with gradient.
    """
    mllm = load_mllm(str(folder), dtype=torch.float32)
    mllm.compile_parts(backend="eager")
    expected = [read(load_mllm(str(folder), dtype=torch.float32), 3, seed) for seed in range(4)]
    for seed, wanted in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(read(mllm, 3, seed), wanted))
        assert graphs() == 1 + 4 + 3
    # A stage-2 batch holds any number of images:
    read(mllm, 5, 4)
    # the ViT layer is traced once more, for all of them
    read(mllm, 4, 5)
    assert graphs() == 1 + 4 + 3 + 1 and not counters["graph_break"]


def test_the_vae_encoder_is_one_graph_whatever_the_bucket():
    vae, compiled = (FluxVAE(autoencoder(widths=(8, 8))) for _ in range(2))
    compiled.compile_parts(backend="eager")
    for height, width in ((48, 32), (32, 48), (64, 32), (48, 48)):
        image = pixels(2, height, width)
        assert torch.equal(compiled.encode(image), vae.encode(image))
    # The first size; then one for all others.
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_frozen_parts_are_as_exact_as_eager_ones(folder, dtype):
    exact, eager, compiled = (
        load_mllm(str(folder), dtype=d) for d in (torch.float64, dtype, dtype)
    )
    compiled.compile_parts()
    for batch, seed in ((3, 0), (3, 1)):
        rows = zip(
            read(compiled, batch, seed, dtype),
            read(eager, batch, seed, dtype),
            read(exact, batch, seed, torch.float64),
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
state, source, _ = launch.build(config, ranks, say=lambda *_: None)
module, gathered = state.sharded.engine.module, []

def look(block, inputs):
    gathered.extend((StorageWeakRef(p.data.untyped_storage()), p.numel()) for p in block.parameters() if p.ndim == 2)
for step, batch in enumerate(source):
    for block in module.modules() if step else ():             # what the first step gathers it also traces
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
def test_zero_3_keeps_no_gathered_weight_of_a_compiled_block_for_its_backward_pass(
    compiled, tmp_path
):
    """Without DeepSpeed's own linear, as on a GPU. Eager blocks keep every one, by which the test is known to see them."""
    (tmp_path / "kept.py").write_text(KEPT)
    with open(tmp_path / "said.txt", "w") as said:
        codes = finish(
            start_ranks(
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
                said=said,
            )
        )
    assert not any(codes), (tmp_path / "said.txt").read_text()[-4000:]
    alive, gathered = json.loads((tmp_path / "kept.json").read_text())
    assert gathered > 1e6 and alive == (0 if compiled else gathered)
