"""LoRA against peft and diffusers, on tiny FLUX, Qwen-Image and Z-Image transformers.

Also freezing, merging, dropout, FLOPs and compiled blocks.
"""

import json
from dataclasses import replace

import pytest
import torch
from parity import inputs, randomize, relative_error, true_float64
from safetensors import safe_open
from test_mmdit import MIXED, QWEN, SMALL
from test_mmdit import run_twin as run_mmdit
from test_mmdit import twin as twin_mmdit
from test_single_stream import SMALL as STREAM
from test_single_stream import run_twin as run_zimage
from test_single_stream import twin as twin_zimage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_models import build, pixels

from iomm import lora
from iomm.config import InputError, LoraConfig
from iomm.flops import condition_tokens, flops_by_part
from iomm.generator import GENERATORS, empty_generator
from iomm.layout import Layout, module_names
from iomm.weights import export_generator, load_generator

PATCH = 2
SETTINGS = LoraConfig(rank=3, alpha=6.0)
TWINS = {"mmdit": (twin_mmdit, run_mmdit), "single_stream": (twin_zimage, run_zimage)}
# Names that peft's list of targets can have.
SUFFIXES = tuple(target for target in lora.TARGETS if "*" not in target)
CONFIGS = pytest.mark.parametrize(
    "config", [SMALL, MIXED, QWEN, STREAM], ids=["flux-dual", "flux", "qwen", "z-image"]
)
# lora targets of TwinFlow's Qwen-Image config.
TWINFLOW = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
)
# Attention from the second block on, the first layer and the last one, parts of fused layers.
SUBSETS = {
    "late": ("transformer_blocks.1.attn.to_out.0", "layers.1.attention.to_k"),
    "ends": ("x_embedder", "proj_out", "all_x_embedder.2-1", "all_final_layer.2-1.linear"),
    "parts": ("to_q", "to_v", "proj_mlp", "feed_forward.w3", "norm_out.linear"),
}


def existing(config, targets):
    """Return those targets that match a layer."""
    names = [name for group in module_names(config, PATCH).values() for name in group]
    return tuple(t for t in targets if any(n == t or n.endswith(f".{t}") for n in names))


def with_lora(config, settings=SETTINGS, dtype=torch.float64):
    """Return a generator with random weights and LoRA with random A and B."""
    generator = randomize(GENERATORS[config.kind](config).to(dtype))
    lora.freeze(generator)
    lora.add_lora(generator, settings, seed=1, patch=PATCH)
    return randomize(generator.to(dtype), std=0.2)


def arguments(config, dtype=torch.float64, grid=(4, 2), num_condition=5):
    noisy, t, condition = inputs(config, grid, num_condition, dtype=dtype)
    return noisy.detach(), t, condition.detach(), grid


def without_lora(generator):
    """Return a generator with the frozen weights as parameters."""
    plain = GENERATORS[generator.config.kind](generator.config)
    plain.to(generator.final.weight.dtype).load_state_dict(lora.frozen_weights(generator))
    return plain


@CONFIGS
def test_fresh_branches_change_no_bit_and_are_all_that_is_trained(config):
    base = randomize(GENERATORS[config.kind](config))
    expected = base(*arguments(config, torch.float32))
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    lora.freeze(base)
    assert not list(base.parameters()) and lora.frozen_weights(base).keys() == before.keys()
    lora.add_lora(base, SETTINGS, seed=1, patch=PATCH)
    velocity = base(*arguments(config, torch.float32))
    assert torch.equal(velocity, expected)
    velocity.square().sum().backward()
    frozen = lora.frozen_weights(base)
    assert all(
        torch.equal(frozen[name], p) and frozen[name].grad is None for name, p in before.items()
    )
    # A has no gradient through a B of zero, and every B has one.
    for name, p in base.named_parameters():
        assert p.grad.any() == (".lora.B." in name) != (".lora.A." in name), name


def test_fresh_branches_depend_only_on_the_seed_and_are_peft_s_uniform():
    def fresh(seed):
        generator = GENERATORS["mmdit"](SMALL)
        lora.freeze(generator)
        lora.add_lora(generator, replace(SETTINGS, rank=16), seed=seed)
        return dict(generator.named_parameters())

    first, same, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "blocks.0.latent_stream.mlp_out.lora.A.weight"
    assert not torch.equal(first[name], other[name])
    bound = SMALL.width * 4
    assert 0.9 * bound**-0.5 < first[name].abs().max() <= bound**-0.5
    assert abs(first[name].std() * (3 * bound) ** 0.5 - 1) < 0.05


@CONFIGS
@pytest.mark.parametrize("targets", [(), *SUBSETS.values()], ids=["default", *SUBSETS])
def test_outputs_and_gradients_equal_peft(config, targets):
    """The layers chosen by default are those that peft chooses by the same names."""
    peft = pytest.importorskip("peft")
    make, run = TWINS[config.kind]
    targets = existing(config, targets)
    ours = with_lora(config, replace(SETTINGS, targets=targets))
    theirs = make(without_lora(ours))
    layout = Layout(config, PATCH)
    given = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        for name in lora.diffusers_lora(ours, PATCH)
        if name.endswith(".lora_A.weight")
    }
    # peft has no wildcards, which are the default for FLUX's single blocks.
    default = {SMALL: SUFFIXES, MIXED: sorted(given), QWEN: TWINFLOW, STREAM: SUFFIXES}[config]
    theirs.add_adapter(
        peft.LoraConfig(
            r=SETTINGS.rank, lora_alpha=SETTINGS.alpha, target_modules=list(targets or default)
        )
    )
    theirs_only = {
        name.removesuffix(".lora_A.default.weight")
        for name, _ in theirs.named_parameters()
        if name.endswith(".lora_A.default.weight")
    } - given
    # Layers that only diffusers has.
    assert all(f"{name}.weight" in layout.fillers for name in theirs_only), theirs_only

    def pairs(grad):
        """Yield (name, our A or B, theirs) or their gradients."""
        for name, linear in lora.layers_with_lora(ours).items():
            all_A = linear.lora.A.weight
            for part, A, B in zip(
                linear.lora.targets,
                (all_A.grad if grad else all_A.detach()).split(SETTINGS.rank),
                linear.lora.B,
                strict=True,
            ):
                layer = theirs.get_submodule(module_names(config, PATCH)[name][part])
                A, B = lora.reordered(layout, name, A, B.weight.grad if grad else B.weight.detach())
                their_A, their_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                yield f"{name} A{part}", A, their_A.grad if grad else their_A
                yield f"{name} B{part}", B, their_B.grad if grad else their_B

    with torch.no_grad():
        for _, mine, other in pairs(grad=False):
            other.copy_(mine)
    velocity = ours(*arguments(config))
    with true_float64():
        expected = run(theirs, *arguments(config))
        (expected * expected.detach().cos()).sum().backward()
    (velocity * expected.detach().cos()).sum().backward()
    errors = {"velocity": relative_error(velocity, expected)}
    errors |= {name: relative_error(mine, other) for name, mine, other in pairs(grad=True)}
    worst = max(errors, key=errors.get)
    assert all(error <= 1e-10 for error in errors.values()), f"{worst}: {errors[worst]:.1e}"


@CONFIGS
def test_merge_gives_the_same_outputs_and_unmerge_the_same_bits(config):
    generator = with_lora(config)
    expected = generator(*arguments(config))
    before = {name: p.clone() for name, p in lora.frozen_weights(generator).items()}
    lora.merge(generator)
    # A second call changes nothing.
    lora.merge(generator)
    # Measured: 6e-15.
    assert relative_error(generator(*arguments(config)), expected) <= 1e-13
    lora.unmerge(generator)
    assert all(torch.equal(lora.frozen_weights(generator)[name], p) for name, p in before.items())
    assert torch.equal(generator(*arguments(config)), expected)


@CONFIGS
def test_merged_export_is_a_generator_like_any_other(config, tmp_path):
    generator = with_lora(config)
    base = without_lora(generator)
    with lora.merged(generator) as state:
        expected = generator(*arguments(config))
        export_generator(generator, tmp_path, patch=PATCH, state=state)
    back = load_generator(tmp_path).requires_grad_(False)
    # The bits of a product depend on the alignment of mapped weights, and on whether they are
    # trained (AMD EPYC, torch 2.13.0).
    for parameter in back.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(back(*arguments(config)), expected)
    changed = {
        name for name, p in back.named_parameters() if not torch.equal(p, base.get_parameter(name))
    }
    assert changed == {f"{name}.weight" for name in lora.layers_with_lora(generator)}


def diffusers_pipeline(transformer):
    """Return diffusers' pipeline with this transformer and nothing else."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    name = type(transformer).__name__.replace("Transformer2DModel", "Pipeline")
    pipeline = getattr(diffusers, name)
    parts = dict.fromkeys(pipeline._get_signature_keys(pipeline)[0])
    return pipeline(**{**parts, "scheduler": scheduler, "transformer": transformer})


@CONFIGS
@pytest.mark.parametrize("targets", [(), SUBSETS["parts"]], ids=["default", "parts"])
def test_exported_file_loads_in_diffusers(config, targets, tmp_path):
    """Their loader takes every tensor, and the velocity is the same with another alpha / rank."""
    pytest.importorskip("peft")
    make, run = TWINS[config.kind]
    ours = with_lora(config, replace(SETTINGS, targets=existing(config, targets)))
    expected = ours(*arguments(config))
    theirs = make(without_lora(ours))
    with true_float64():
        assert relative_error(run(theirs, *arguments(config)), expected) > 0.1
    origin = {"run": "runs/x", "step": "7"}
    path = lora.save_lora(ours, tmp_path, patch=PATCH, origin=origin)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    pipeline = diffusers_pipeline(theirs)
    pipeline.load_lora_weights(tmp_path)
    with true_float64():
        # Measured: 2e-14.
        assert relative_error(run(theirs, *arguments(config)), expected) <= 1e-10
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["iomm"]) == origin
    loaded = {
        f"transformer.{name.replace('.default_0', '')}"
        for name, _ in theirs.named_parameters()
        if ".lora_" in name
    }
    assert names == loaded


@CONFIGS
@pytest.mark.parametrize(
    "targets",
    [
        (),
        ("to_q", "to_k", "to_v"),
        ("transformer_blocks.1.attn.to_out.0", "layers.1.attention.to_out.0"),
        ("proj_out", "all_final_layer.2-1.linear"),
        ("x_embedder", "all_x_embedder.2-1"),
    ],
    ids=["default", "qkv", "second block", "last layer", "first layer"],
)
def test_training_flops_match_pytorch_flop_counter(config, targets):
    """Frozen weights have no gradient, and no gradient passes the first layer with LoRA."""
    generator = empty_generator(config, device="meta")
    lora.freeze(generator)
    settings = replace(SETTINGS, targets=existing(config, targets))
    lora.add_lora(generator, settings, patch=PATCH)
    grid, num_condition = (5, 7), 11
    noisy, t, condition = (
        torch.empty(shape, device="meta")
        for shape in ((1, 35, config.token_dim), (1,), (1, num_condition, config.condition_dim))
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity = generator(noisy, t, condition, grid)
        forward = counter.get_total_flops()
        velocity.sum().backward()
    assert generator.flops_per_image(grid, num_condition) == forward
    total = counter.get_total_flops()
    assert generator.flops_per_image(grid, num_condition, training=True) == total
    assert forward < total < 3 * forward


@pytest.mark.parametrize(
    "target, message",
    [
        ("to_x", r"lora.targets: to_x matches no linear layer .* transformer_blocks.\*.attn.to_q"),
        ("o_q", "o_q matches no"),
        ("attn.norm_q", "attn.norm_q matches no"),
    ],
)
def test_a_target_without_a_layer_is_rejected_with_the_names_that_exist(target, message):
    generator = GENERATORS["mmdit"](SMALL)
    lora.freeze(generator)
    with pytest.raises(InputError, match=message):
        lora.add_lora(generator, replace(SETTINGS, targets=("to_k", target)))


def test_targets_may_have_wildcards():
    generator = empty_generator(MIXED, device="meta")
    lora.freeze(generator)
    lora.add_lora(
        generator, replace(SETTINGS, targets=("transformer_blocks.*.to_?", "*.1.proj_mlp"))
    )
    assert {n: m.lora.targets for n, m in lora.layers_with_lora(generator).items()} == {
        "blocks.0.latent_stream.qkv": (0, 1, 2),
        "blocks.1.latent_stream.qkv": (0, 1, 2),
        "single_blocks.1.linear_in": (3,),
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": -1}, "lora.rank must be >= 0, got -1"),
        ({"alpha": 0.0}, "lora.alpha must be > 0"),
        ({"dropout": 1.0}, "lora.dropout must be in"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**settings)


def model_with_lora(mllm, generator="mmdit", **settings):
    """Return an IOMM with a random base and random A and B."""
    model = build(mllm, generator=generator)
    model.recipe = replace(model.recipe, lora=replace(SETTINGS, **settings))
    model.add_lora()
    return randomize(model, std=0.2)


def losses(model, numbers):
    n_B = torch.tensor(numbers)
    return model(*pixels(n_B), n_B)[1]


def test_dropout_depends_on_the_sample_and_not_on_its_batch(mllm):
    """It is off without numbers, as in sampling, and unbiased."""
    plain, dropped = model_with_lora(mllm), model_with_lora(mllm, dropout=0.25)
    batch = losses(dropped, [5, 9, 12])
    alone = torch.cat([losses(dropped, [n]) for n in (5, 9, 12)])
    # Products of another batch size are rounded differently. Measured: 2e-7.
    assert torch.allclose(batch, alone, rtol=2e-6)
    assert not torch.allclose(batch, losses(plain, [5, 9, 12]), rtol=1e-3)
    assert torch.equal(batch, losses(dropped, [5, 9, 12]))
    condition, _ = plain.encode_condition(plain.prepare(*pixels([1]), torch.tensor([1])).condition)
    noisy = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    given = noisy, torch.tensor([0.3]), condition, None, (8, 8)
    assert torch.equal(dropped.velocity(*given), plain.velocity(*given))
    branch = dropped.generator.blocks[0].latent_stream.qkv.lora
    branch.n_R, x = torch.arange(200), torch.ones(200, 3, 64)
    kept = branch.drop(x)
    assert kept.unique().tolist() == [0.0, (x[0, 0, 0] / 0.75).item()]
    # The standard error of the share is 0.0022.
    assert abs((kept == 0).float().mean() - 0.25) < 0.009
    # Every layer has its own numbers.
    lora.number_rows(dropped.generator, torch.arange(200))
    other = dropped.generator.blocks[1].latent_stream.qkv.lora
    assert not torch.equal(branch.drop(x), other.drop(x))


@pytest.mark.parametrize("generator", ["mmdit", "single_stream"])
def test_recompute_gives_the_same_gradients(mllm, generator):
    """Recomputed blocks drop the same values. Adapter and MLLM get no gradient."""
    gradients = []
    for recompute in (0, 2):
        model = model_with_lora(mllm, generator, dropout=0.1)
        model.prepare_blocks(recompute=recompute)
        n_B = torch.tensor([3, 4])
        model(*pixels(n_B), n_B)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(".lora." in name and grad.any() for name, grad in gradients[0].items())
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


@pytest.mark.parametrize("generator", ["mmdit", "single_stream"])
def test_blocks_with_lora_compile_as_one_graph(mllm, generator, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **settings: compiled(f, backend="aot_eager", **settings)
    )
    found = []
    for is_compiled in (False, True):
        model = model_with_lora(mllm, generator, dropout=0.1)
        # The MLLM is shared by the tests of this file.
        monkeypatch.setattr(type(mllm), "compile_parts", lambda *_: None)
        model.prepare_blocks(compiled=is_compiled)
        n_B = torch.tensor([3, 4])
        loss = model(*pixels(n_B), n_B)[0]
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True))


def test_flops_of_a_sample_leave_out_the_frozen_parts(mllm):
    """Counted by PyTorch from the condition on."""
    model, full = model_with_lora(mllm), build(mllm)
    ours, theirs = flops_by_part(model, 32, 12), flops_by_part(full, 32, 12)
    assert ours["adapter"] == theirs["adapter"] / 3 and ours["ViT"] == theirs["ViT"]
    num_prefix, _ = condition_tokens(model, 12)
    assert ours["MLLM"] == theirs["MLLM"] - mllm.decoder_flops(num_prefix, 8)[2]
    grid = (8, 8)
    assert ours["generator"] == model.generator.flops_per_image(grid, 8, training=True)
    assert theirs["generator"] == 3 * full.generator.flops_per_image(grid, 8)


def test_checksum_depends_on_every_weight_but_not_on_dtype_or_lora():
    def frozen(dtype=torch.float32, change=None, seed=0):
        generator = randomize(GENERATORS["mmdit"](SMALL), seed=seed).to(dtype)
        if change:
            change(generator)
        lora.freeze(generator)
        return lora.checksum(generator, part=1000)

    def swap(generator):
        weight = generator.blocks[1].latent_stream.out.weight.data
        weight[[0, 1]] = weight[[1, 0]]

    def nudge(generator):
        generator.final.bias.data[-1] *= 1.01

    assert frozen() == frozen(torch.bfloat16)
    assert len({frozen(), frozen(change=swap), frozen(change=nudge), frozen(seed=1)}) == 4
    generator = with_lora(SMALL, dtype=torch.float32)
    assert lora.checksum(generator) == lora.checksum(generator, part=77) == frozen()
