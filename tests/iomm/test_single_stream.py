"""SingleStream against diffusers' ZImageTransformer2DModel: outputs and every gradient.

Also parameter counts, FLOPs and fresh weights.
"""

from dataclasses import replace

import pytest
import torch
from parity import inputs, randomize, relative_error, true_float64
from torch.utils.flop_counter import FlopCounterMode

from iomm.config import PRESETS, GeneratorConfig, InputError
from iomm.generator import empty_generator, new_generator
from iomm.kernels.noisy_tokens import patch_tokens, unpatch
from iomm.layers import rope_tables
from iomm.layout import NORM_FREE as NORM_FREE_KEY
from iomm.layout import Layout, to_diffusers_config
from iomm.single_stream import SingleStream, joint_tables

PATCH = 2
SMALL = GeneratorConfig(
    kind="single_stream",
    width=96,
    num_heads=3,
    num_blocks=2,
    num_refiner_blocks=2,
    token_dim=12,
    condition_dim=20,
    rope_theta=256.0,
)
NORM_FREE = replace(SMALL, norm_affine=False)


def twin(model, dtype=torch.float64):
    """Return diffusers' model with our weights."""
    from diffusers import ZImageTransformer2DModel

    description = {
        key: value
        for key, value in to_diffusers_config(model.config, PATCH).items()
        if key not in ("_class_name", NORM_FREE_KEY)
    }
    theirs = ZImageTransformer2DModel(**description).to(dtype)
    theirs.load_state_dict(Layout(model.config, PATCH).to_theirs(model.state_dict()), strict=True)
    return theirs


def run_twin(theirs, noisy, t, condition, grid):
    """Return their velocity in our conventions.

    Their time is 1 - t, their sign is opposite, and they do not pack tokens.
    """
    latents = unpatch(noisy, grid[0] * PATCH, grid[1] * PATCH, PATCH)
    images = theirs(
        list(latents[:, :, None].unbind()), 1 - t, list(condition.unbind()), return_dict=False
    )[0]
    return -patch_tokens(torch.stack(images)[:, :, 0], PATCH)


@pytest.mark.parametrize("config", [SMALL, NORM_FREE], ids=["affine", "norm-free"])
@pytest.mark.parametrize("grid, num_condition", [((3, 5), 7), ((4, 8), 32), ((5, 9), 33)])
def test_outputs_and_all_gradients_equal_diffusers(config, grid, num_condition):
    ours = randomize(SingleStream(config).double())
    theirs = twin(ours)
    mine, other = inputs(config, grid, num_condition), inputs(config, grid, num_condition)
    velocity = ours(*mine, grid)
    with true_float64():
        expected = run_twin(theirs, *other, grid)
        (expected * expected.detach().cos()).sum().backward()
    (velocity * expected.detach().cos()).sum().backward()
    errors = {"velocity": relative_error(velocity, expected)}
    errors |= {
        "noisy": relative_error(mine[0].grad, other[0].grad),
        "condition": relative_error(mine[2].grad, other[2].grad),
    }
    layout, their_gradients = (
        Layout(config, PATCH),
        {name: parameter.grad for name, parameter in theirs.named_parameters()},
    )
    unpadded = {
        "latent_pad_1D": grid[0] * grid[1] % 32 == 0,
        "condition_pad_1D": num_condition % 32 == 0,
    }
    for name, parameter in ours.named_parameters():
        if unpadded.get(name):
            # There is no pad token, so the gradient is zero, but not None.
            assert not parameter.grad.any()
            assert not their_gradients[layout.pieces[name][0][0]].any()
        else:
            errors[name] = relative_error(
                parameter.grad, layout.to_ours(name, their_gradients.__getitem__)
            )
    worst = max(errors, key=errors.get)
    # Measured: 4e-15.
    assert all(error <= 1e-10 for error in errors.values()), f"{worst}: {errors[worst]:.1e}"


def test_float32_error_is_no_worse_than_diffusers():
    ours, grid = randomize(SingleStream(SMALL).double()), (5, 7)
    exact = ours(*inputs(SMALL, grid, 9), grid)
    ours.float()
    arguments = *inputs(SMALL, grid, 9, dtype=torch.float32), grid
    got, theirs = ours(*arguments), run_twin(twin(ours, torch.float32), *arguments)
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= budget


def test_batch_equals_its_samples():
    model, grid = randomize(SingleStream(SMALL).double()), (3, 3)
    noisy, t, condition = inputs(SMALL, grid, 5, batch=3)
    together = model(noisy, t, condition, grid)
    alone = torch.cat(
        [model(noisy[i : i + 1], t[i : i + 1], condition[i : i + 1], grid) for i in range(3)]
    )
    # Measured: 1.4e-15. A batch sums in another order.
    assert relative_error(together, alone) <= 1e-14


def test_preset_has_6_billion_parameters():
    model = empty_generator(PRESETS["iomm-xl"], device="meta")
    assert 5.7e9 < sum(parameter.numel() for parameter in model.parameters()) < 6.3e9


@pytest.mark.parametrize("config", [SMALL, PRESETS["iomm-xl"]], ids=["small", "iomm-xl"])
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
    first = new_generator(SMALL, 3)
    torch.manual_seed(2)
    second = new_generator(SMALL, 3, dtype=torch.float64)
    noisy, t, condition = inputs(SMALL, (3, 3), 4, dtype=torch.float32)
    assert all(
        torch.equal(one.double(), two)
        for one, two in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not first(noisy, t, condition, (3, 3)).any()
    assert all(parameter.isfinite().all() for parameter in new_generator(NORM_FREE, 4).parameters())


def test_layers_compile_as_one_graph():
    model, grid = randomize(SingleStream(SMALL)), (3, 3)
    arguments = *inputs(SMALL, grid, 5, dtype=torch.float32), grid
    expected = model(*arguments)
    for layer in model.modules():
        if isinstance(layer, SingleStream.block_classes):
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager")
    assert torch.equal(model(*arguments), expected)


def test_settings_of_the_other_kind_are_rejected():
    with pytest.raises(InputError, match="num_single_blocks"):
        replace(SMALL, num_single_blocks=1)
    with pytest.raises(InputError, match="norm_affine"):
        GeneratorConfig(width=64, num_heads=2, num_blocks=1, norm_affine=False)


def test_larger_image_extends_the_rope_positions():
    """Rows and columns are counted from 0 at any size and never rescaled, as in Z-Image."""
    from diffusers import ZImageTransformer2DModel

    config = PRESETS["iomm-xl"]
    small, large = (
        joint_tables(
            (side, side),
            256,
            config.rope_axes,
            config.rope_theta,
            torch.device("cpu"),
            torch.float64,
        )
        for side in (32, 64)
    )
    for few, many in zip(small, large, strict=True):
        assert torch.equal(
            many[: 64 * 64].unflatten(0, (64, 64))[:32, :32].flatten(0, 1), few[: 32 * 32]
        )
    ids = ZImageTransformer2DModel.create_coordinate_grid((1, 64, 64), (257, 0, 0)).flatten(0, 2)
    assert torch.equal(
        large[0][: 64 * 64],
        rope_tables(ids, config.rope_axes, config.rope_theta, "cpu", torch.float64)[0],
    )
