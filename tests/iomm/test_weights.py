"""Exports against diffusers, bitwise round trips, shards, memory, and invalid folders."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import host_memory
import pytest
import torch
from host_memory import mapped_from
from parity import inputs, randomize, relative_error, true_float64
from safetensors.torch import load_file, save_file
from test_mmdit import MIXED, QWEN
from test_mmdit import SMALL as DUAL
from test_mmdit import run_twin as run_mmdit
from test_single_stream import NORM_FREE
from test_single_stream import SMALL as SINGLE
from test_single_stream import run_twin as run_zimage

from iomm.config import PRESETS, InputError
from iomm.generator import empty_generator, new_generator
from iomm.layout import (
    Layout,
    diffusers_class,
    from_diffusers_config,
    to_diffusers_config,
)
from iomm.weights import (
    export_generator,
    initialize_generator,
    load_frozen,
    load_generator,
    load_module,
    read_folder,
    save_module,
    stored_dtype,
)

CONFIGS = pytest.mark.parametrize(
    "config",
    [DUAL, MIXED, QWEN, SINGLE, NORM_FREE],
    ids=["dual", "dual+single", "qwen", "single", "norm-free"],
)


def random_model(config, dtype=torch.float32):
    return randomize(empty_generator(config)).to(dtype)


def run_diffusers(folder, config, arguments):
    """Return the velocity that diffusers computes from the folder."""
    import diffusers

    run = run_mmdit if config.kind == "mmdit" else run_zimage
    model, report = getattr(diffusers, diffusers_class(config)).from_pretrained(
        folder, torch_dtype=torch.float64, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with true_float64():
        return run(model, *arguments)


@CONFIGS
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100_000], ids=["one file", "shards"])
def test_export_equals_diffusers_and_loads_exactly(config, max_shard_bytes, tmp_path):
    model = random_model(config)
    export_generator(model, tmp_path, max_shard_bytes=max_shard_bytes)
    back = load_generator(tmp_path)
    assert back.config == config and not back.training
    state, same = model.state_dict(), back.state_dict()
    assert state.keys() == same.keys() and all(
        torch.equal(state[name], same[name]) for name in state
    )
    arguments = *inputs(config, (3, 5), 7), (3, 5)
    ours, theirs = back.double()(*arguments), run_diffusers(tmp_path, config, arguments)
    # Measured: 2.3e-15.
    assert relative_error(ours, theirs) <= 1e-14


def test_shards_respect_the_limit_and_have_an_index(tmp_path):
    export_generator(random_model(DUAL), tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    largest = max(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= max(100_000, largest)
    # An export over an old one leaves none of its files.
    export_generator(random_model(DUAL), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_export_of_another_state_and_dtype(tmp_path):
    model, ema = random_model(DUAL), randomize(empty_generator(DUAL), seed=9)
    export_generator(model, tmp_path, state=ema.state_dict(), dtype=torch.bfloat16)
    back = load_generator(tmp_path)
    assert all(
        torch.equal(one.bfloat16(), two)
        for one, two in zip(ema.parameters(), back.parameters(), strict=True)
    )
    wide = load_generator(tmp_path, dtype=torch.float32)
    assert all(
        torch.equal(one.bfloat16().float(), two)
        for one, two in zip(ema.parameters(), wide.parameters(), strict=True)
    )
    state = ema.state_dict()
    del state["final.bias"]
    with pytest.raises(InputError, match=r"missing final\.bias"):
        export_generator(model, tmp_path / "other", state=state)
    assert not (tmp_path / "other").exists()


@CONFIGS
@pytest.mark.parametrize("patch", [2, 1])
def test_config_survives_the_diffusers_format(config, patch):
    assert from_diffusers_config(to_diffusers_config(config, patch), "here")[0] == config
    assert (
        from_diffusers_config(json.loads(json.dumps(to_diffusers_config(config, patch))), "here")[0]
        == config
    )


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo"])
def test_presets_fit_diffusers_models(preset):
    """Compare names and shapes at full size, on the meta device."""
    import diffusers

    config = PRESETS[preset]
    description = to_diffusers_config(config, 2)
    with torch.device("meta"):
        theirs = getattr(diffusers, description.pop("_class_name"))(**description)
    assert Layout(config, 2).shapes == {
        name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()
    }


@pytest.fixture
def exported(tmp_path):
    export_generator(random_model(DUAL), tmp_path)
    return tmp_path


def rewrite(folder, change):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(tensors):
    tensors["proj_outs.bias"] = tensors.pop("proj_out.bias")
    tensors["x_embedder.bias"] = tensors["x_embedder.bias"][:5].clone()


def cut(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index(folder, name):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": name}})
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda folder: rewrite(folder, rename),
            "missing proj_out.bias; unknown proj_outs.bias; x_embedder.bias has shape",
        ),
        (
            lambda folder: rewrite(
                folder,
                lambda tensors: tensors["time_text_embed.text_embedder.linear_2.bias"].fill_(1),
            ),
            "pooled text vector",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "JSON object"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
            "diffusion_pytorch_model.safetensors",
        ),
        (cut, "safetensors"),
        (lambda folder: edit_config(folder, _class_name="UNet2DModel"), "UNet2DModel"),
        (lambda folder: edit_config(folder, guidance_embeds=True), "guidance_embeds=True"),
        (lambda folder: edit_config(folder, axes_dims_rope=[8, 12, 12]), "axes_dims_rope"),
        (lambda folder: edit_config(folder, num_attention_heads="2"), "invalid entry"),
        (lambda folder: edit_config(folder, num_layers=3), "missing transformer_blocks.2"),
        (lambda folder: index(folder, "../weights.safetensors"), "weight_map"),
        (lambda folder: index(folder, "gone.safetensors"), "gone.safetensors"),
    ],
)
def test_wrong_folder_raises_one_line_error(exported, damage, message):
    damage(exported)
    with pytest.raises(InputError, match=message) as caught:
        load_generator(exported)
    assert "\n" not in str(caught.value)


def test_unsupported_shapes_are_not_exported(tmp_path):
    with pytest.raises(InputError, match="rope theta"):
        export_generator(random_model(replace(DUAL, rope_theta=5000.0)), tmp_path / "a")
    with pytest.raises(InputError, match="patch of 5 x 5"):
        export_generator(random_model(SINGLE), tmp_path / "b", patch=5)
    with pytest.raises(InputError, match="patch of 5 x 5"):
        export_generator(random_model(QWEN), tmp_path / "c", patch=5)
    with pytest.raises(InputError, match="no diffusers model has condition_norm True"):
        export_generator(random_model(replace(DUAL, condition_norm=True)), tmp_path / "d")


def test_module_survives_save_and_load(tmp_path):
    first, second = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)) for _ in range(2)
    )
    save_module(first, tmp_path / "parts" / "adapter.safetensors")
    load_module(second, tmp_path / "parts" / "adapter.safetensors")
    assert all(
        torch.equal(one, two)
        for one, two in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(
        InputError, match=r"missing weight; missing bias; unknown 0\.bias; unknown 0\.weight"
    ):
        load_module(torch.nn.Linear(3, 4), tmp_path / "parts" / "adapter.safetensors")
    with pytest.raises(InputError, match="cannot read"):
        load_module(first, tmp_path / "none.safetensors")


def test_pickled_weights_are_not_loaded(exported):
    torch.save({"x": torch.zeros(1)}, exported / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="as safetensors"):
        load_generator(exported)


@pytest.fixture(scope="module")
def large_folders(tmp_path_factory):
    """Folders of a random MLLM, VAE and generator in float32, with 16 to 60 MB of weights each."""
    from toy_models import TEXT, VISION, autoencoder

    from iomm.config import RECONSTRUCT
    from iomm.engine.shapes.mllm import create_mllm

    root = tmp_path_factory.mktemp("large")
    vision = VISION | {"hidden_size": 256, "intermediate_size": 1024}
    text = TEXT | {"hidden_size": 512, "intermediate_size": 2048}
    create_mllm(root / "mllm", texts=[RECONSTRUCT], vision=vision, text=text)
    autoencoder(widths=(32, 64, 128, 256)).save_pretrained(root / "vae")
    shape = replace(PRESETS["iomm-b-quarter"], token_dim=64, condition_dim=64)
    export_generator(new_generator(shape, 0), root / "generator")
    return [root / name for name in ("mllm", "vae", "generator")]


def test_loading_holds_no_private_copy_on_the_host(large_folders):
    """On the meta device, in place of a GPU: what is moved there leaves the host."""
    done = subprocess.run(
        [sys.executable, host_memory.__file__, *map(str, large_folders)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    mllm, vae, generator = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for folder in large_folders
    )
    assert min(mllm, vae, generator) > 15e6
    # What else a load takes: the modules, the tokenizer, and the largest single tensor.
    slack = 6e6
    for name, size in {
        "MLLM, CPU": mllm,
        "MLLM, cast, device": mllm,
        "VAE, cast, device": vae,
        "generator, CPU": generator,
        "generator, cast, device": generator,
        "trained parts, device": generator,
    }.items():
        assert grown[name] < size / 10 + slack, (name, size, grown)


def file_tensors(folder, dtype):
    """Return how often each (shape, bytes) occurs in the files of a folder, cast to `dtype`."""
    return Counter(
        (tuple(tensor.shape), tensor.to(dtype).reshape(-1).view(torch.uint8).numpy().tobytes())
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        # The MLLM has no language-model head.
        if "lm_head" not in name
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_models_have_the_bits_of_their_files(mllm_folder, stored, dtype, tmp_path):
    from toy_models import autoencoder

    from iomm.internvl import load_mllm
    from iomm.vae import load_vae

    folders = tmp_path / "mllm", tmp_path / "vae"
    shutil.copytree(mllm_folder, folders[0])
    autoencoder().save_pretrained(folders[1])
    for folder in folders:
        (path,) = folder.glob("*.safetensors")
        tensors = {name: tensor.to(stored) for name, tensor in load_file(path).items()}
        # config.json keeps float32, which must not matter.
        save_file(tensors, path, metadata={"format": "pt"})
    exact = load_mllm(str(mllm_folder), dtype=torch.float32)
    mllm, vae = load_mllm(str(folders[0]), dtype=dtype), load_vae(str(folders[1]), dtype=dtype)
    for model, folder in zip((mllm, vae), folders, strict=True):
        found = Counter(
            (tuple(p.shape), p.reshape(-1).view(torch.uint8).numpy().tobytes())
            for p in model.parameters()
        )
        assert found == file_tensors(folder, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
    for one, two in zip(mllm.buffers(), exact.buffers(), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)
    files = {mapped_from(p)[0] for p in mllm.parameters()}
    assert (files == {str(folders[0] / "model.safetensors")}) == (stored == dtype)


def test_training_writes_nothing_into_the_map(mllm):
    from toy_models import build, pixels

    n_B = torch.arange(2)
    model = build(mllm)
    model(*pixels(n_B), n_B)[0].backward()
    for parameter in mllm.parameters():
        path, private = mapped_from(parameter)
        assert path.endswith("model.safetensors") and private == 0


def test_a_write_to_a_mapped_weight_does_not_reach_the_file(exported):
    before = load_file(exported / "diffusion_pytorch_model.safetensors")
    before = {name: tensor.clone() for name, tensor in before.items()}
    model = load_generator(exported)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    after = load_file(exported / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_any_module_loads_from_a_sharded_folder(tmp_path):
    """Two files of different dtypes with an index in transformers' naming, and a buffer."""
    torch.manual_seed(0)
    source = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    source(torch.randn(8, 6))
    state = source.state_dict()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[name.startswith("1.")] for name in state}
    for file in names:
        dtype = torch.bfloat16 if file == names[0] else torch.float32
        part = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
            if where[name] == file
        }
        save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert stored_dtype(tmp_path, "model") == torch.float32
    tensors = read_folder(tmp_path, "model")
    for dtype in (None, torch.float32):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
        load_frozen(model, tensors.__getitem__, dtype=dtype)
        for name, tensor in model.state_dict().items():
            cast = dtype if tensor.is_floating_point() else None
            expected = tensors[name].to(cast or tensors[name].dtype)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            assert bool(mapped_from(tensor)[0]) == (expected is tensors[name])
    (tmp_path / names[1]).write_bytes(b"damaged")
    assert stored_dtype(tmp_path, "model") is None
    with pytest.raises(InputError, match="as safetensors"):
        read_folder(tmp_path, "model")


@pytest.mark.slow
def test_full_iomm_b_survives_export_in_bfloat16(tmp_path):
    model = new_generator(PRESETS["iomm-b"], 0, dtype=torch.bfloat16)
    export_generator(model, tmp_path, max_shard_bytes=1_000_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), load_generator(tmp_path).parameters(), strict=True)
    )


def their_model(name):
    """Return a tiny random FLUX.1, Qwen-Image or Z-Image model of diffusers, config and runner."""
    import diffusers

    torch.manual_seed(0)
    if name == "flux":
        model = diffusers.FluxTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=16,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 14, 14),
        )
        return randomize(model.double()), MIXED, run_mmdit
    if name == "qwen":
        model = diffusers.QwenImageTransformer2DModel(
            in_channels=QWEN.token_dim,
            out_channels=QWEN.token_dim // 4,
            num_layers=QWEN.num_blocks,
            attention_head_dim=QWEN.head_dim,
            num_attention_heads=QWEN.num_heads,
            joint_attention_dim=QWEN.condition_dim,
            axes_dims_rope=QWEN.rope_axes,
        )
        return randomize(model.double()), QWEN, run_mmdit
    model = diffusers.ZImageTransformer2DModel(
        in_channels=SINGLE.token_dim // 4,
        dim=SINGLE.width,
        n_layers=SINGLE.num_blocks,
        n_refiner_layers=SINGLE.num_refiner_blocks,
        n_heads=SINGLE.num_heads,
        n_kv_heads=SINGLE.num_heads,
        cap_feat_dim=SINGLE.condition_dim,
        rope_theta=SINGLE.rope_theta,
        axes_dims=list(SINGLE.rope_axes),
    )
    return randomize(model.double()), SINGLE, run_zimage


@pytest.mark.parametrize("name", ["flux", "qwen", "zimage"])
def test_foreign_weights_give_the_outputs_of_diffusers(name, tmp_path):
    """Whole models: everything fits, and FLUX's pooled text vector is zero but not its embedder."""
    theirs, config, run = their_model(name)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    found, patch = from_diffusers_config(json.loads(path.read_text()), path)
    assert found == config
    ours = new_generator(config, 0).double()
    done = initialize_generator(ours, tmp_path, patch=patch)
    assert not done.fresh and not done.unused and len(done.taken) == len(ours.state_dict())
    arguments = *inputs(config, (3, 5), 7), (3, 5)
    with true_float64():
        expected = run(theirs, *arguments)
    # Measured: 1.4e-15, 1.9e-15 and 3.5e-15.
    assert relative_error(ours(*arguments), expected) <= 1e-14


@pytest.mark.parametrize("name", ["flux", "qwen", "zimage"])
def test_foreign_weights_are_taken_where_they_fit(name, tmp_path):
    """Another encoder's width: its projection stays fresh, everything else is taken."""
    theirs, config, _ = their_model(name)
    theirs.save_pretrained(tmp_path)
    whole = new_generator(config, 3).double()
    initialize_generator(whole, tmp_path, patch=2)
    ours = new_generator(replace(config, condition_dim=40), 3).double()
    fresh = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    done = initialize_generator(ours, tmp_path, patch=2)
    assert set(done.fresh) == {"condition_in.weight"} | (
        set() if name == "flux" else {"condition_norm.weight"}
    )
    assert "has shape" in done.fresh["condition_in.weight"]
    for key, tensor in ours.state_dict().items():
        # The outputs of `whole` are those of diffusers (test above).
        assert torch.equal(tensor, (fresh if key in done.fresh else whole.state_dict())[key]), key


def test_foreign_weights_without_a_fitting_block_are_refused(tmp_path):
    theirs, config, _ = their_model("flux")
    theirs.save_pretrained(tmp_path)
    wide = new_generator(replace(config, width=128, num_heads=4), 0)
    with pytest.raises(InputError, match=r"no weights for the blocks .*model\.preset=from-init"):
        initialize_generator(wide, tmp_path, patch=2)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"cannot read .* as safetensors"):
        initialize_generator(new_generator(config, 0), tmp_path, patch=2)


def test_config_of_a_published_checkpoint_may_omit_defaults():
    """FLUX.1-schnell's config.json, which is older than some entries, and FLUX.1-dev's guidance."""
    schnell = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    }
    config, _ = from_diffusers_config(schnell, "config.json")
    assert (config.width, config.num_blocks, config.num_single_blocks) == (3072, 19, 38)
    with pytest.raises(InputError, match="guidance_embeds=True"):
        from_diffusers_config(schnell | {"guidance_embeds": True}, "config.json")
    assert from_diffusers_config(schnell | {"guidance_embeds": True}, "", ("guidance_embeds",))
    qwen = {"_class_name": "QwenImageTransformer2DModel", "pooled_projection_dim": 768}
    config, patch = from_diffusers_config(qwen, "")
    assert config == PRESETS["qwen-image"] and patch == 2
    for changes in ({"zero_cond_t": True}, {"out_channels": 64}, {"patch_size": 0}):
        with pytest.raises(InputError, match=next(iter(changes))):
            from_diffusers_config(qwen | changes, "")
    config, patch = from_diffusers_config({"_class_name": "ZImageTransformer2DModel"}, "")
    assert replace(config, condition_dim=1536, token_dim=64) == PRESETS["iomm-xl"] and patch == 2
