"""MMDiT against diffusers' FLUX and Qwen-Image transformers: outputs and every gradient.

Also parameter counts, FLOPs and fresh weights.
"""

import math
from dataclasses import replace

import pytest
import torch
from counted_ops import Counter
from parity import inputs, randomize, relative_error, true_float64
from torch.utils.flop_counter import FlopCounterMode

from iomm import layers, mmdit
from iomm.config import PRESETS, GeneratorConfig, InputError, RouteConfig
from iomm.generator import empty_generator, new_generator
from iomm.kernels.norm_modulate import norm_modulate
from iomm.layout import Layout, to_diffusers_config
from iomm.masking import kept_tokens
from iomm.mmdit import EPS, MMDiT, Route, grid_tables

SMALL = GeneratorConfig(width=64, num_heads=2, num_blocks=2, token_dim=12, condition_dim=20)
MIXED = GeneratorConfig(
    width=96, num_heads=3, num_blocks=2, num_single_blocks=2, token_dim=8, condition_dim=16
)
QWEN = replace(SMALL, condition_norm=True, positions="centred")


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def twin(model, dtype=torch.float64, patch=2):
    """Return diffusers' model with our weights."""
    import diffusers

    description = to_diffusers_config(model.config, patch)
    theirs = getattr(diffusers, description.pop("_class_name"))(**description).to(dtype)
    theirs.load_state_dict(Layout(model.config, patch).to_theirs(model.state_dict()), strict=True)
    return theirs


def use_float64_tables(rope):
    """Replace the rotary tables of diffusers' Qwen-Image, which are complex64 in every dtype."""
    for name in ("pos_freqs", "neg_freqs"):
        rounded = getattr(rope, name)
        index = torch.arange(len(rounded), dtype=torch.float64)
        index -= len(rounded) if name == "neg_freqs" else 0
        angles = torch.cat(
            [
                torch.outer(index, rope.theta ** -(torch.arange(0, dim, 2).double() / dim))
                for dim in rope.axes_dim
            ],
            dim=1,
        )
        exact = torch.polar(torch.ones_like(angles), angles)
        # Angles up to 4096 are rounded to float32.
        assert (exact - rounded).abs().max() < 1e-3
        setattr(rope, name, exact)


def run_twin(theirs, noisy, t, condition, grid, lengths=None):
    """Return the velocity of diffusers' model. Only Qwen-Image's takes ragged conditions."""
    rows, columns = grid
    if type(theirs).__name__ == "QwenImageTransformer2DModel":
        mask = None
        if lengths is not None:
            mask = torch.arange(condition.shape[1]) < lengths[:, None]
        if noisy.dtype == torch.float64:
            use_float64_tables(theirs.pos_embed)
        return theirs(noisy, condition, mask, t, [[(1, rows, columns)]], return_dict=False)[0]
    latent_ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    pooled = noisy.new_zeros(len(noisy), theirs.config.pooled_projection_dim)
    text_ids = torch.zeros(condition.shape[1], 3)
    return theirs(noisy, condition, pooled, t, latent_ids.float(), text_ids, return_dict=False)[0]


def errors_against_diffusers(config, grid, num_condition, lengths=None):
    """Return {name: relative error} of the velocity and of every gradient in float64."""
    ours = randomize(MMDiT(config).double())
    theirs = twin(ours)
    mine, other = inputs(config, grid, num_condition), inputs(config, grid, num_condition)
    velocity = ours(*mine, grid, lengths)
    with true_float64():
        expected = run_twin(theirs, *other, grid, lengths)
        (expected * expected.detach().cos()).sum().backward()
    (velocity * expected.detach().cos()).sum().backward()
    errors = {"velocity": relative_error(velocity, expected)}
    errors |= {
        "noisy": relative_error(mine[0].grad, other[0].grad),
        "condition": relative_error(mine[2].grad, other[2].grad),
    }
    layout, their_gradients = (
        Layout(config, 2),
        {name: parameter.grad for name, parameter in theirs.named_parameters()},
    )
    for name, parameter in ours.named_parameters():
        errors[name] = relative_error(
            parameter.grad, layout.to_ours(name, their_gradients.__getitem__)
        )
    return errors


@pytest.mark.parametrize("config", [SMALL, MIXED, QWEN], ids=["dual", "dual+single", "qwen"])
@pytest.mark.parametrize("grid, num_condition", [((3, 5), 7), ((4, 2), 1), ((1, 6), 9)])
def test_outputs_and_all_gradients_equal_diffusers(config, grid, num_condition):
    errors = errors_against_diffusers(config, grid, num_condition)
    worst = max(errors, key=errors.get)
    # Measured: 1.8e-15, and 7.2e-14 for Qwen-Image.
    assert all(error <= 1e-10 for error in errors.values()), f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("grid", [(3, 5), (2, 8)])
def test_ragged_conditions_equal_diffusers_qwen_image(grid):
    errors = errors_against_diffusers(QWEN, grid, 7, lengths=torch.tensor([7, 3]))
    worst = max(errors, key=errors.get)
    # Measured: 7.2e-14.
    assert all(error <= 1e-10 for error in errors.values()), f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("config", [SMALL, QWEN], ids=["flux", "qwen"])
def test_tensors_only_in_diffusers_have_no_effect(config):
    """Tensors that only diffusers has do not change its output and get no gradient.

    Those of the pooled text vector are not included.
    """
    theirs = twin(randomize(MMDiT(config).double()))
    arguments = *inputs(config, (3, 4), 5), (3, 4)
    before = run_twin(theirs, *arguments)
    layout = Layout(config, 2)
    rows = {their: count for pieces in layout.pieces.values() for their, count in pieces}
    dead = [name for name in layout.fillers if not name.startswith("time_text_embed.text_embedder")]
    with torch.no_grad():
        for name in dead:
            theirs.get_parameter(name)[rows.get(name, 0) :] = 1.0
    after = run_twin(theirs, *arguments)
    after.square().sum().backward()
    gradients = [(name, theirs.get_parameter(name).grad) for name in dead]
    assert len(dead) == 11 and torch.equal(before, after)
    assert all(
        gradient is None or not gradient[rows.get(name, 0) :].any() for name, gradient in gradients
    )


@pytest.mark.parametrize("config", [MIXED, QWEN], ids=["flux", "qwen"])
def test_float32_error_is_no_worse_than_diffusers(config):
    ours = randomize(MMDiT(config).double())
    exact = ours(*inputs(config, (5, 3), 6), (5, 3))
    ours.float()
    arguments = *inputs(config, (5, 3), 6, dtype=torch.float32), (5, 3)
    got, theirs = ours(*arguments), run_twin(twin(ours, torch.float32), *arguments)
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= budget


@pytest.mark.parametrize("config", [MIXED, QWEN], ids=["flux", "qwen"])
def test_bfloat16_error_is_no_worse_than_diffusers(config):
    ours = randomize(MMDiT(config).double())
    exact = ours(*inputs(config, (4, 4), 6), (4, 4))
    ours.bfloat16()
    noisy, t, condition = inputs(config, (4, 4), 6)
    arguments = noisy.bfloat16(), condition.bfloat16()
    got = ours(arguments[0], t.float(), arguments[1], (4, 4))
    theirs = run_twin(twin(ours, torch.bfloat16), arguments[0], t.float(), arguments[1], (4, 4))
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert got.dtype == torch.bfloat16 and (got - exact).abs().max() <= budget


def sequence_first(x, dims):
    """Return x with `dims`, those before the channels in the order of memory, sequence first."""
    order = [*dims, *range(len(dims), x.ndim)]
    return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


@pytest.mark.parametrize("config", [SMALL, MIXED, QWEN], ids=["dual", "dual+single", "qwen"])
def test_memory_layout_of_attention_changes_no_result(config, monkeypatch):
    """On GPUs qk_norm_rope and attention are sequence-first in memory (L, B, A, E)."""
    model = randomize(MMDiT(config).double())
    tensors = inputs(config, (3, 5), 7)
    wanted = model(*tensors, (3, 5))
    leaves = [tensors[0], tensors[2], *model.parameters()]
    gradients = torch.autograd.grad(wanted.square().sum(), leaves)
    real_rope, real_attention, seen = mmdit.qk_norm_rope, layers.dense_attention, []

    def rope(*arguments, condition=None, **options):
        joint = real_rope(*arguments, condition=condition, **options)
        return joint if condition is None else [sequence_first(x, (1, 0)) for x in joint]

    def attention(q, *rest):
        out = real_attention(q, *rest)
        seen.append(q.stride(2) > q.stride(0))
        return sequence_first(out, (2, 0, 1)) if seen[-1] else out

    monkeypatch.setattr(mmdit, "qk_norm_rope", rope)
    monkeypatch.setattr(layers, "dense_attention", attention)
    got = model(*tensors, (3, 5))
    assert seen == [True] * config.num_blocks + [False] * config.num_single_blocks
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(
        torch.autograd.grad(got.square().sum(), leaves), gradients, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_parts_of_sequence_first_attention_are_projected_without_copies():
    linears = [layers.TokenLinear(6, 6).double() for _ in range(2)]
    parts = list(zip(linears, (3, 5), strict=True))
    attended_BLD = torch.randn(2, 8, 6, dtype=torch.float64)
    found = []
    for order in ((0, 1), (1, 0)):
        leaf = sequence_first(attended_BLD, order).requires_grad_()
        with Counter() as forward:
            outputs = layers.project_parts(leaf, parts)
        weights = [sequence_first(x.detach().cos(), order) for x in outputs]
        with Counter() as backward:
            gradients = torch.autograd.grad(
                outputs, [leaf, *linears[0].parameters(), *linears[1].parameters()], weights
            )
        found.append((outputs, gradients, forward.names, backward.names))
    (outputs, gradients, *copied), (others, other_gradients, forward, backward) = found
    for got, wanted in zip((*others, *other_gradients), (*outputs, *gradients), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert forward == ["addmm"] * 2
    assert sorted(backward) == ["cat", *["mm"] * 4, *["sum"] * 2]
    # Slices of a batch-first tensor are no matrices.
    assert "clone" in copied[0]


@pytest.mark.parametrize(
    "preset, low, high", [("iomm-b", 1.55e9, 1.65e9), ("iomm-l", 2.65e9, 2.8e9)]
)
def test_presets_have_the_papers_parameter_counts(preset, low, high):
    assert low < count(empty_generator(PRESETS[preset], device="meta")) < high


def test_qwen_image_preset_equals_the_shape_of_diffusers():
    from diffusers import QwenImageTransformer2DModel

    config = PRESETS["qwen-image"]
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    layout = Layout(config, 2)
    assert layout.shapes == shapes
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == 20_430_401_088
    # The last block lacks 14 of the matrices of width x width that diffusers computes in vain.
    dead = total - count(empty_generator(config, device="meta"))
    assert dead == 14 * 3072**2 + 11 * 3072 + 128


@pytest.mark.parametrize(
    "config",
    [SMALL, MIXED, QWEN, PRESETS["iomm-b"]],
    ids=["dual", "dual+single", "qwen", "iomm-b"],
)
@pytest.mark.parametrize("grid, num_condition", [((32, 32), 256), ((5, 7), 11)])
def test_flops_match_pytorch_flop_counter(config, grid, num_condition):
    model = empty_generator(config, device="meta")
    arguments = (
        torch.empty(shape, device="meta")
        for shape in (
            (1, grid[0] * grid[1], config.token_dim),
            (1,),
            (1, num_condition, config.condition_dim),
        )
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments, grid)
    assert model.flops_per_image(grid, num_condition) == counter.get_total_flops()


def test_fresh_weights_depend_only_on_the_seed():
    torch.manual_seed(1)
    first = new_generator(MIXED, 3)
    torch.manual_seed(2)
    torch.rand(7)
    state = torch.get_rng_state()
    second = new_generator(MIXED, 3, dtype=torch.float64)
    assert torch.equal(state, torch.get_rng_state())
    third = new_generator(MIXED, 4)
    for (name, one), two, three in zip(
        first.named_parameters(), second.parameters(), third.parameters(), strict=True
    ):
        assert torch.equal(one.double(), two), name
        drawn = name.endswith("weight") and "norm" not in name and one.any()
        assert not (drawn and torch.equal(one, three)), name


def test_fresh_blocks_are_identity_and_velocity_is_zero():
    model = new_generator(SMALL, 0)
    noisy, t, condition = inputs(SMALL, (3, 3), 4, dtype=torch.float32)
    assert not model(noisy, t, condition, (3, 3)).any()
    latents, tables = torch.randn(2, 9, 64), (torch.zeros(9, 16), torch.zeros(9, 16))
    assert torch.equal(
        model.blocks[0](latents, torch.randn(2, 4, 64), torch.randn(2, 64), *tables)[0], latents
    )
    q, k, v = model.blocks[0].latent_stream.qkv.weight.chunk(3)
    # Xavier of 64 x 64, not of 192 x 64.
    assert all(abs(part.std() / (2 / 128) ** 0.5 - 1) < 0.05 for part in (q, k, v))


@pytest.mark.parametrize("config", [SMALL, QWEN], ids=["flux", "qwen"])
def test_rope_table_from_sampling_works_in_training(config):
    model, grid = randomize(MMDiT(config)), (2, 11)
    with torch.inference_mode():
        model(*inputs(config, grid, 3, dtype=torch.float32), grid)
    model(*inputs(config, grid, 3, dtype=torch.float32), grid).sum().backward()


@pytest.mark.parametrize("config", [MIXED, QWEN], ids=["flux", "qwen"])
def test_blocks_compile_as_one_graph(config):
    model, grid = randomize(MMDiT(config)), (3, 3)
    arguments = *inputs(config, grid, 5, dtype=torch.float32), grid
    expected = model(*arguments)
    for block in model.modules():
        if isinstance(block, MMDiT.block_classes):
            block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    assert torch.equal(model(*arguments), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 0},
        {"num_heads": 3},
        {"width": 48},
        {"kind": "unet"},
        {"positions": "center"},
        {"kind": "single_stream", "condition_norm": True},
        {"kind": "single_stream", "positions": "centred"},
    ],
)
def test_invalid_generator_shape_is_rejected(changes):
    with pytest.raises(InputError, match="generator"):
        replace(SMALL, **changes)


def test_larger_image_extends_the_rope_positions():
    """From 512 to 1024 px, rows and columns are counted and never rescaled, as in FLUX.

    The upper left quarter of the larger image has the angles of the smaller image. At both sizes
    they equal those of diffusers' ids and rotary embedding.
    """
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    config = PRESETS["iomm-b"]
    tables = {
        side: grid_tables(
            (side, side), config.rope_axes, config.rope_theta, torch.device("cpu"), torch.float32
        )
        for side in (32, 64)
    }
    for side, ours in tables.items():
        ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        theirs = FluxPosEmbed(theta=10000, axes_dim=list(config.rope_axes))(ids)
        for mine, other in zip(ours, theirs, strict=True):
            # Theirs contains each angle twice.
            assert torch.equal(mine, other[:, ::2]) and torch.equal(mine, other[:, 1::2])
    for small, large in zip(tables[32], tables[64], strict=True):
        assert torch.equal(large.unflatten(0, (64, 64))[:32, :32].flatten(0, 1), small)


ROUTED = replace(SMALL, num_blocks=5)


def routed_by_hand(model, noisy, t, condition, grid, lengths, kept, first, last):
    """Run blocks one sample at a time, with the kept tokens alone in the routed ones."""
    velocities = []
    for b in range(len(noisy)):
        one = slice(b, b + 1)
        latents = model.latents_in(noisy[one])
        length = condition.shape[1] if lengths is None else int(lengths[b])
        inside = condition[one, :length]
        if model.config.condition_norm:
            inside = model.condition_norm(inside)
        inside, time = model.condition_in(inside), torch.nn.functional.silu(model.time_in(t[one]))
        # Condition tokens without a position are not in the tables.
        tables = model.rotary_tables(grid, length, latents)
        num_first = len(tables[0]) - latents.shape[1]
        rows = torch.cat((torch.arange(num_first), num_first + kept[b]))
        for number, block in enumerate(model.blocks, 1):
            if first <= number <= last:
                alone, inside = block(
                    latents[:, kept[b]], inside, time, *(table[rows] for table in tables)
                )
                latents = latents.index_copy(1, kept[b], alone)
            else:
                latents, inside = block(latents, inside, time, *tables)
        scale, shift = model.final_modulation(time).chunk(2, dim=-1)
        velocities.append(model.final(norm_modulate(latents, shift, scale, eps=EPS)))
    return torch.cat(velocities)


@pytest.mark.parametrize("positions", ["corner", "centred"])
@pytest.mark.parametrize("ragged", [False, True])
def test_routed_tokens_skip_exactly_the_middle_blocks(positions, ragged):
    """Velocity and every gradient equal blocks that run on the kept tokens of each sample alone.

    With centred positions the condition is rotated too.
    """
    config = replace(ROUTED, positions=positions)
    model = randomize(MMDiT(config).double(), std=0.2)
    grid, batch = (3, 5), 3
    noisy, t, condition = inputs(config, grid, 7, batch=batch)
    lengths = torch.tensor([7, 4, 6]) if ragged else None
    settings = RouteConfig(ratio=0.5, first=2, last=4)
    kept = kept_tokens(settings, 3, torch.arange(batch), 15)
    route = Route(kept, 15, *settings.blocks_in(config))
    leaves = [noisy, condition, *model.parameters()]
    got = model(noisy, t, condition, grid, lengths, route=route)
    exact = routed_by_hand(model, noisy, t, condition, grid, lengths, kept, 2, 4)
    assert relative_error(got, exact) < 1e-12
    gradients = torch.autograd.grad(got.square().sum(), leaves)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(exact.square().sum(), leaves), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-10 and ours.abs().max() > 0
    assert relative_error(model(noisy, t, condition, grid, lengths), exact) > 1e-3


def test_tapped_latents_of_a_routed_block_are_those_of_all_tokens():
    model = randomize(MMDiT(ROUTED).double(), std=0.2)
    arguments = *inputs(ROUTED, (3, 5), 7), (3, 5)
    kept = kept_tokens(RouteConfig(ratio=0.6), 3, torch.arange(2), 15)
    route = Route(kept, 15, 2, 4)
    before, inside, after = (model(*arguments, tap=tap, route=route)[1] for tap in (1, 2, 4))
    skipped = torch.ones(2, 15, dtype=torch.bool).scatter(1, kept, False)
    for tapped in (inside, after):
        assert torch.equal(tapped[skipped], before[skipped])
        assert not torch.equal(tapped[~skipped], before[~skipped])


def test_route_is_a_pure_function_of_seed_and_number():
    settings, numbers = RouteConfig(ratio=0.5), torch.arange(64)
    kept = kept_tokens(settings, 7, numbers, 40)
    assert kept.shape == (64, 20) and (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept[5:9], kept_tokens(settings, 7, numbers[5:9], 40))
    assert not torch.equal(kept[:4], kept_tokens(settings, 8, numbers[:4], 40))
    # Each token is kept in about half of the samples: 5 standard deviations are 0.31.
    assert (torch.bincount(kept.flatten(), minlength=40) / 64 - 0.5).abs().max() < 0.32
    assert kept_tokens(RouteConfig(), 7, numbers, 40) is None


def test_flops_of_a_routed_step_are_counted():
    settings = RouteConfig(ratio=0.5, first=2, last=4)
    with torch.device("meta"):
        model = MMDiT(ROUTED)
        noisy, t, condition = torch.empty(1, 16, 12), torch.empty(1), torch.empty(1, 7, 20)
        kept = torch.zeros(1, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(noisy, t, condition, (4, 4), route=Route(kept, 16, 2, 4))
    assert counter.get_total_flops() == model.flops_per_image((4, 4), 7, route=settings)
    assert model.flops_per_image((4, 4), 7, route=settings) < model.flops_per_image((4, 4), 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ratio=1.0), "route.ratio must be at least 0 and below 1, got 1.0"),
        (dict(ratio=0.5, first=0), "route.first must be >= 1"),
        (dict(ratio=0.5, first=4, last=3), "blocks from 1 to 4 in this order, got 4 and 3"),
        (dict(ratio=0.5, last=5), "blocks from 1 to 4 in this order, got 3 and 5"),
    ],
)
def test_invalid_route_is_rejected(settings, message):
    with pytest.raises(InputError, match=message):
        RouteConfig(**settings).blocks_in(ROUTED)
    with pytest.raises(InputError, match="of kind mmdit, got single_stream"):
        RouteConfig(ratio=0.5).blocks_in(PRESETS["iomm-xl"])
