"""Alignment with the ViT: loss, grids, FLOPs and memory, and whole runs with a head."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_checks import assert_no_worse
from launches import LIMIT_S, PIXELS, ROOT, environment, hashes, rows, start
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_models import build, pixels, walk

from iomm.alignment import AlignmentHead, alignment_loss, on_grid
from iomm.config import PRESETS, AlignConfig, GeneratorConfig, InputError
from iomm.engine import loop
from iomm.engine.builders import load_run, without_head
from iomm.engine.config import OptimSection, load_config, parse
from iomm.engine.data.decode import Decoder, Encoded
from iomm.engine.data.index import build as build_index
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import Batch, ImageSource
from iomm.engine.dry_run import (
    activation_bytes,
    build_without_weights,
    make_plan,
    prepared_bytes,
    work,
)
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes.dataset import write_dataset
from iomm.flops import flops_by_part
from iomm.generator import new_generator
from iomm.internvl import load_mllm

GENERATORS = {
    "mmdit": dict(num_blocks=2, num_single_blocks=2),
    "single_stream": dict(kind="single_stream", num_blocks=3, num_refiner_blocks=1),
}


def aligned(mllm, generator="mmdit", weight=0.5, share=1.0, **settings):
    """Return a tiny IOMM with an alignment head. `settings` are those of AlignConfig."""
    model, align = build(mllm), AlignConfig(weight=weight, **settings)
    shape = dict(width=64, num_heads=2, token_dim=48, condition_dim=mllm.width)
    model.generator = new_generator(GeneratorConfig(**shape, **GENERATORS[generator]), 0)
    model.alignment = AlignmentHead(align, 64, mllm)
    model.alignment.init_weights(0)
    draw = torch.Generator().manual_seed(1)
    # Fresh blocks are the identity, and the latents after each of them would be equal.
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.05)
    model.recipe = replace(model.recipe, align=align, align_share=share)
    return model


def mixture(n_B, has_image, every=False):
    """Return arguments of `prepare` for images and pairs.

    With `every`, they include the ViT pixels of pairs.
    """
    vae_pixels, vit_pixels = pixels(n_B)
    captions = [
        "" if image else f"{n} red circles"
        for n, image in zip(n_B.tolist(), has_image, strict=True)
    ]
    chosen = torch.tensor(has_image)
    return vae_pixels, vit_pixels if every else vit_pixels[chosen], n_B, None, captions, has_image


def gradients(model, *inputs):
    model.zero_grad()
    model(*inputs)[0].backward()
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("pairs", [False, True])
def test_alignment_loss_is_averaged_over_noise_draws(mllm, pairs):
    """Test it for images only and with aligned pairs. The weight is per sample, not per draw."""
    model, n_B, has_image = aligned(mllm, pairs=pairs), torch.arange(4), [True, False, True, False]
    inputs = mixture(n_B, has_image, every=pairs)
    model.recipe = replace(model.recipe, noise_draws=2)
    loss, loss_R, _, align_I = model(*inputs)
    given = model.prepare(*inputs)
    _, latents_RND = model.velocity(
        given.noisy_RNK,
        given.t_R,
        model.encode_condition(given.condition)[0].repeat_interleave(2, 0),
        None,
        given.grid,
        tap=model.recipe.align.block_in(4),
    )
    rows = torch.arange(4) if pairs else torch.tensor([0, 2])
    wanted_I = sum(
        alignment_loss(model.alignment(latents_RND[2 * rows + k]), given.align_IND) for k in (0, 1)
    )
    assert torch.allclose(align_I, wanted_I / 2, rtol=1e-4)
    assert torch.allclose(loss, loss_R.mean() + 0.5 * align_I.sum() / 4, rtol=1e-5)


# Grids


def axis_matrix(length, side):
    """Return weights (length, side) of one axis: window means, or linear interpolation."""
    weights = torch.zeros(length, side, dtype=torch.float64)
    for i in range(length):
        if length <= side:
            first, last = i * side // length, -(-(i + 1) * side // length)
            weights[i, first:last] = 1 / (last - first)
        else:
            # Position of the centre of cell i among the centres of the tokens, clamped at the ends.
            at = max((i + 0.5) * side / length - 0.5, 0.0)
            low = min(math.floor(at), side - 1)
            weights[i, low] += 1 - (at - low)
            weights[i, min(low + 1, side - 1)] += at - low
    return weights


@pytest.mark.parametrize(
    "grid", [(4, 4), (2, 2), (8, 8), (3, 3), (5, 7), (2, 8), (8, 2), (1, 16), (4, 6)], ids=str
)
def test_on_grid_resamples_each_axis_independently(grid):
    tokens = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reference(tokens):
        over_rows, over_columns = (axis_matrix(length, 4).to(tokens.dtype) for length in grid)
        return torch.einsum(
            "ra,cb,iabd->ircd", over_rows, over_columns, tokens.unflatten(1, (4, 4))
        ).flatten(1, 2)

    exact = reference(tokens)
    assert_no_worse(on_grid(tokens.float(), grid), reference(tokens.float()), exact)
    assert (on_grid(tokens, grid) - exact).abs().max() <= 1e-14 * exact.abs().max()
    if grid == (4, 4):
        assert on_grid(tokens, grid) is tokens


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (64, 16)], ids=str)
def test_vit_sees_the_whole_crop_stretched(size):
    """Resampled to the latent grid, the ViT's pixels match the VAE's in every bucket.

    `on_grid` relies on this. Other arrangements of the square (its centre, transposed, mirrored)
    have at least three times the error.
    """
    draw = np.random.default_rng(0)
    small = Image.fromarray(draw.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    image = small.resize((96, 72), Image.Resampling.BICUBIC)
    encoded = Encoded(
        [np_png(image)], np.zeros(1, bool), np.full((1, 2), 0.5, np.float32), np.ones(1, bool), size
    )
    ((vae_pixels, vit_pixels),) = Decoder(1, 32, "cpu")([encoded])
    seen = vit_pixels[0].permute(2, 0, 1) / 127.5 - 1
    grid = tuple(side // 4 for side in size)
    wanted = torch.nn.functional.avg_pool2d(vae_pixels, 4)[0].flatten(1).T

    def error(square):
        tokens = torch.nn.functional.avg_pool2d(square[None], 4).flatten(2).transpose(1, 2)
        return (on_grid(tokens, grid)[0] - wanted).abs().mean()

    middle = torch.nn.functional.interpolate(
        seen[None, :, 8:24, 8:24], size=(32, 32), mode="bilinear"
    )[0]
    others = middle, seen.transpose(1, 2), seen.flip(1), seen.flip(2)
    assert 3 * error(seen) < min(error(other) for other in others)


def np_png(image):
    import io

    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_alignment_targets_are_row_major_squares(mllm):
    """Image token (r, c) covers the patches at rows 2 r, 2 r + 1 and columns 2 c, 2 c + 1."""
    rows_columns = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).view(1, 8, 8, 2)
    shuffled = mllm.backbone.pixel_shuffle(rows_columns, scale_factor=0.5).view(4, 4, 4, 2)
    centres = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).view(4, 4, 2) * 2 + 0.5
    assert torch.equal(shuffled.mean(2), centres)
    states = mllm.vit_states(pixels(torch.arange(1))[1])
    patches = mllm.backbone.vision_tower.embeddings.patch_embeddings
    assert states.shape == (1, 64, mllm.vit_width)
    bright = torch.zeros(1, 3, 32, 32)
    # Patch (1, 6).
    bright[..., 4:8, 24:28] = 1.0
    seen = patches(bright)
    seen = (seen[0] if isinstance(seen, tuple) else seen).flatten(0, 1)
    assert int((seen - seen[0]).abs().sum(1).argmax()) == 1 * 8 + 6


# Loss and gradients


def literal(projected_IND, target_IND):
    unit = [x / x.square().sum(-1, keepdim=True).sqrt() for x in (projected_IND, target_IND)]
    return (1 - (unit[0] * unit[1]).sum(-1)).mean(1)


def test_alignment_loss_matches_its_formula():
    draw = torch.Generator().manual_seed(0)
    projected, target = (
        torch.randn(3, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    projected.requires_grad_()
    exact = literal(projected, target)
    assert (alignment_loss(projected, target) - exact).abs().max() <= 1e-15 * 2
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x, target), projected)
    assert_no_worse(
        alignment_loss(projected.float(), target.float()),
        literal(projected.float(), target.float()),
        exact,
    )
    assert alignment_loss(projected.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert (
        alignment_loss(2 * target, target).abs().max() <= 1e-15
        and (alignment_loss(-target, target) - 2).abs().max() <= 1e-15
    )


@pytest.mark.parametrize("target", ["vit", "projector"])
@pytest.mark.parametrize(
    "generator, block",
    [
        ("mmdit", 1),
        ("mmdit", 2),
        ("mmdit", 3),
        ("mmdit", 4),
        ("mmdit", 0),
        ("single_stream", 1),
        ("single_stream", 3),
    ],
)
def test_alignment_gradients_match_the_formula(mllm_folder, generator, block, target):
    """Compare with the formula in float64.

    It is velocity loss + weight x mean of 1 - cos(MLP(latents of the block), target).
    """
    mllm = load_mllm(str(mllm_folder), dtype=torch.float64)
    model, n_B, held = (
        aligned(mllm, generator, block=block, target=target).double(),
        torch.arange(3),
        {},
    )
    blocks = [*model.generator.blocks, *getattr(model.generator, "single_blocks", [])]
    # A third of 4 blocks, rounded up.
    number = block or 2

    def hold(_, __, output):
        held["out"] = output[0] if isinstance(output, tuple) else output

    ours = gradients(model, *pixels(n_B), n_B)
    hook = blocks[number - 1].register_forward_hook(hold)
    loss, loss_B, _, align_I = model(*pixels(n_B), n_B)
    hook.remove()
    latents = held["out"]
    # In a joint sequence the condition comes first in FLUX, the latents first in Z-Image.
    if latents.shape[1] > 64:
        latents = latents[:, -64:] if generator == "mmdit" else latents[:, :64]
    head = model.alignment
    hidden = torch.nn.functional.silu(latents @ head.linear_in.weight.T + head.linear_in.bias)
    hidden = torch.nn.functional.silu(
        hidden @ head.linear_hidden.weight.T + head.linear_hidden.bias
    )
    projected = hidden @ head.linear_out.weight.T + head.linear_out.bias
    seen = mllm.backbone.get_image_features(pixels(n_B)[1].double(), output_hidden_states=False)
    if target == "vit":
        wanted = mllm.backbone.vision_tower(pixels(n_B)[1].double()).last_hidden_state[:, 1:]
    else:
        wanted = on_grid(seen.pooler_output, (8, 8))
    assert (literal(projected, wanted) - align_I).abs().max() <= 1e-12
    assert (loss - (loss_B.mean() + 0.5 * literal(projected, wanted).mean())).abs() <= 1e-12
    # The gradient is the sum of the velocity loss's without a head and the formula's.
    model.zero_grad()
    literal(projected, wanted).mean().mul(0.5).backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    model.alignment = None
    plain = gradients(model, *pixels(n_B), n_B)
    # A bias shared by all keys cancels in the softmax, so its gradient is only rounding error.
    del ours["adapter.to_k.bias"]
    for name, grad in ours.items():
        parts = [g for g in (theirs.get(name), plain.get(name)) if g is not None]
        # The adapter's gradient passes through Qwen2's norms, which always compute in float32.
        eps = torch.finfo(torch.float32 if name.startswith("adapter.") else torch.float64).eps
        assert (grad - sum(parts)).abs().max() <= 64 * eps * grad.abs().max(), name
    assert all(ours[name].abs().max() > 0 for name in ours if name.startswith("alignment."))
    assert all(p.grad is None for p in mllm.parameters())


def test_velocity_loss_does_not_depend_on_the_head(mllm):
    """Velocity losses and times are bitwise equal with and without the head.

    With weight 0 there is no head and no fourth result.
    """
    model, n_B = aligned(mllm), torch.arange(4)
    loss, loss_B, t_B, align_I = model(*pixels(n_B), n_B)
    model.alignment = None
    found = model(*pixels(n_B), n_B)
    assert (
        len(found) == 3
        and torch.equal(found[1], loss_B)
        and torch.equal(found[2], t_B)
        and torch.equal(found[0], loss_B.mean())
    )
    assert loss > found[0] and align_I.shape == (4,) and align_I.min() > 0 and align_I.max() < 2
    off = build_without_weights(
        load_config(PIXELS, ["align.block=2", "align.target=projector", "align.pairs=true"])
    )
    plain = build_without_weights(load_config(PIXELS))
    assert off.alignment is None and [*dict(off.named_parameters())] == [
        *dict(plain.named_parameters())
    ]
    assert work(off, load_config(PIXELS)) == work(
        plain, load_config(PIXELS)
    ) and "align" not in work(plain, load_config(PIXELS))


def test_vit_runs_once_per_batch(mllm, monkeypatch):
    ran = []
    for name in ("vit_states", "project"):
        work = getattr(mllm, name)
        monkeypatch.setattr(
            mllm, name, lambda x, name=name, work=work: ran.append((name, len(x))) or work(x)
        )
    n_B, has_image = torch.arange(4), [True, False, True, False]
    for settings, inputs, wanted in [
        ({}, (*pixels(n_B), n_B), [("vit_states", 4), ("project", 4)]),
        (dict(target="projector"), (*pixels(n_B), n_B), [("vit_states", 4), ("project", 4)]),
        (dict(share=0.5), mixture(n_B, has_image), [("vit_states", 2), ("project", 2)]),
        (dict(share=0.5), mixture(n_B, [False] * 4), []),
        (
            dict(pairs=True),
            mixture(n_B, has_image, every=True),
            [("vit_states", 4), ("project", 2)],
        ),
        (dict(pairs=True), mixture(n_B, [False] * 4, every=True), [("vit_states", 4)]),
        (
            dict(pairs=True, target="projector"),
            mixture(n_B, has_image, every=True),
            [("vit_states", 4), ("project", 4)],
        ),
    ]:
        ran.clear()
        aligned(mllm, **settings)(*inputs)
        assert ran == wanted, settings


# Images and pairs


@pytest.mark.parametrize("target", ["vit", "projector"])
def test_pairs_are_aligned_only_on_request(mllm, target):
    n_B, has_image = torch.arange(6), [True, False, False, True, False, True]
    chosen = torch.tensor(has_image)
    model = aligned(mllm, target=target, share=0.5)
    loss, loss_B, _, align_I = model(*mixture(n_B, has_image))
    alone = model(*(x[chosen] for x in pixels(n_B)), n_B[chosen])[3]
    assert torch.allclose(align_I, alone, rtol=1e-5)
    assert loss.item() == pytest.approx((loss_B.mean() + 0.5 * align_I.mean()).item(), rel=1e-6)
    every = aligned(mllm, target=target, pairs=True)
    _, every_B, _, all_B = every(*mixture(n_B, has_image, every=True))
    assert (
        all_B.shape == (6,)
        and torch.allclose(all_B[chosen], align_I, rtol=1e-5)
        and torch.allclose(every_B, loss_B, rtol=1e-5)
    )


def test_micro_batch_gradients_average_to_the_batch(mllm):
    """Cut six samples, four of them images, into micro-batches of three and of one.

    The micro-batches of three have three images and one image.
    """
    n_B, has_image = torch.arange(6), [True, True, True, False, False, True]
    model = aligned(mllm, share=4 / 6)
    whole = gradients(model, *mixture(n_B, has_image))
    for size in (3, 1):
        parts = [
            gradients(model, *mixture(n_B[i : i + size], has_image[i : i + size]))
            for i in range(0, 6, size)
        ]
        for name, grad in whole.items():
            mean = sum(part[name] for part in parts) / len(parts)
            assert torch.allclose(mean, grad, rtol=1e-3, atol=1e-6), name


def test_unaligned_pairs_give_the_head_zero_gradients(mllm):
    model, n_B, called = aligned(mllm, share=0.5), torch.arange(3), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        # These modules receive a gradient at their output.
        if name.startswith(("alignment", "generator.blocks")):
            module.register_full_backward_pre_hook(
                lambda *_, name=name: called.append(f"back {name}")
            )
    model(*mixture(n_B, [True, False, True]))[0].backward()
    mixed, called[:] = list(called), []
    model.zero_grad()
    loss, loss_B, _, align_I = model(*mixture(n_B, [False] * 3))
    loss.backward()
    assert called == mixed and "alignment.linear_out" in called and "back alignment" in called
    assert align_I.shape == (0,) and torch.equal(loss, loss_B.mean())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.alignment.parameters())
    model.alignment = None
    wanted = gradients(model, *mixture(n_B, [False] * 3))
    assert all(
        torch.equal(p.grad, wanted[name])
        for name, p in model.named_parameters()
        if p.grad is not None
    )


@pytest.mark.parametrize(
    "settings, has_image",
    [
        ({}, [True] * 4),
        (dict(share=0.5), [True, False, False, True]),
        (dict(share=0.5), [False] * 4),
        (dict(pairs=True, target="projector"), [True, False, False, True]),
    ],
    ids=str,
)
def test_prepared_batch_gives_bitwise_equal_results(mllm, settings, has_image):
    model, n_B = aligned(mllm, **settings), torch.arange(4)
    inputs = mixture(n_B, has_image, every=settings.get("pairs", False))
    prepared = model.prepare(*inputs)
    assert {id(x) for x in walk(prepared)} == {id(x) for x in prepared.tensors()}
    assert prepared.align_IND is not None and not any(x.requires_grad for x in prepared.tensors())
    assert all(torch.equal(a, b) for a, b in zip(model(prepared), model(*inputs), strict=True))
    found = gradients(model, prepared), gradients(model, *inputs)
    assert all(
        torch.equal(found[0][name], found[1][name])
        for name in found[0]
        if found[0][name] is not None
    )


def test_cached_latents_give_the_same_alignment(mllm):
    model, n_B = aligned(mllm), torch.arange(3)
    vae_pixels, vit_pixels = pixels(n_B)
    latents = model.frozen[1].encode(vae_pixels)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model(None, vit_pixels, n_B, latents), model(vae_pixels, vit_pixels, n_B), strict=True
        )
    )


@pytest.mark.parametrize("generator", GENERATORS)
def test_alignment_of_a_bucket_uses_the_whole_image(mllm, generator):
    """Images of 16 x 64 pixels have 4 x 16 latent tokens.

    Of the ViT's 8 x 8 tokens, the rows are pooled and the columns interpolated.
    """
    model, n_B = aligned(mllm, generator), torch.arange(2)
    vae_pixels, vit_pixels = (
        torch.rand(2, 3, 16, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        pixels(n_B)[1],
    )
    loss, _, _, align_I = model(vae_pixels, vit_pixels, n_B)
    loss.backward()
    prepared = model.prepare(vae_pixels, vit_pixels, n_B)
    assert prepared.grid == (4, 16) and torch.equal(
        prepared.align_IND, on_grid(mllm.vit_states(vit_pixels), (4, 16))
    )
    assert align_I.shape == (2,) and model.alignment.linear_in.weight.grad.abs().max() > 0


def test_source_gives_vit_pixels_of_pairs_on_request(tmp_path):
    folder = write_dataset(tmp_path / "tars", num_images=16, size_px=32, shard_size=8)
    shards = Shards(build_index(folder, tmp_path / "index", progress=False))

    class Plan:
        """A plan in which every second sample is a pair."""

        def __call__(self, n, attempt=0):
            return np.asarray(n) % 16

        def size_px(self, step):
            return 32, 32

        def is_pair(self, n):
            return np.asarray(n) % 2 == 1

    found = [
        next(
            iter(
                ImageSource(
                    shards,
                    seed=0,
                    global_batch=4,
                    micro_batch=4,
                    rank=0,
                    world_size=1,
                    size_px=32,
                    vit_px=32,
                    device="cpu",
                    num_steps=1,
                    sampler=Plan(),
                    look_at_pairs=pairs,
                )
            )
        )
        for pairs in (False, True)
    ]
    assert [batch.has_image for batch in found] == [[True, False, True, False]] * 2
    assert found[0].vit_pixels_BHWC.shape[0] == 2 and torch.equal(
        found[1].vit_pixels_BHWC[::2], found[0].vit_pixels_BHWC
    )
    assert (
        torch.equal(found[0].pixels_BCHW, found[1].pixels_BCHW)
        and found[1].captions[1] == found[0].captions[1] != ""
    )


# The step


class Engine:
    """Stand-in for zero.Sharded: accumulates gradients, and every second pass is the last."""

    def __init__(self, model):
        self.model, self.passes, self.last_micro_batch = model, 0, False

    def __call__(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss):
        (loss / 2).backward()

    def step(self):
        self.passes += 1
        return self.passes % 2 == 0


def test_step_logs_velocity_loss_and_nonfinite_samples(mllm):
    model, n_B, has_image = aligned(mllm, share=0.25), torch.arange(4), [True, False, False, False]

    def batches():
        for part in (slice(0, 2), slice(2, 4)):
            vae_pixels, vit_pixels, n, _, captions, image = mixture(n_B[part], has_image[part])
            yield Batch(n, n, vae_pixels, vit_pixels, 0.0, captions=captions, has_image=image)

    loss, by_time, applied, _, _, seen, aligned_sums = loop.train_step(Engine(model), batches())
    whole = model(*mixture(n_B, has_image))
    assert (
        loss.item() == pytest.approx(whole[1].mean().item(), rel=1e-6)
        and by_time.shape == (2, 4)
        and applied
    )
    assert aligned_sums.tolist() == pytest.approx([whole[3].sum().item(), 1.0])
    assert [n.tolist() for n, _ in seen] == [[0, 1], [0], [2, 3], []]
    model.alignment.register_forward_hook(lambda *args: args[2] * float("nan"))
    model.zero_grad()
    loss, _, _, _, _, seen, aligned_sums = loop.train_step(Engine(model), batches())
    assert loss.isfinite() and not aligned_sums[0].isfinite() and aligned_sums[1] == 1
    ranks = SimpleNamespace(all=lambda value: [value])
    assert loop.describe_nonfinite(seen, ranks) == "; not finite: 0"
    assert (
        not torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        .isfinite()
        .all()
    )


# Counts


def test_alignment_flops_match_the_flop_counter(mllm):
    """The head adds exactly the counted FLOPs to both passes, and so does the projector."""
    n_B = torch.arange(2)

    def count(work):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    for generator in GENERATORS:
        for target in ("vit", "projector"):
            model = aligned(mllm, generator, target=target)
            part = flops_by_part(model, 32, 20)["align"]
            with_head = count(lambda: model(*pixels(n_B), n_B)[0].backward())  # noqa: B023
            model.alignment = None
            without = count(lambda: model(*pixels(n_B), n_B)[0].backward())  # noqa: B023
            assert with_head - without == 2 * part
    states = mllm.vit_states(pixels(n_B)[1])
    assert (
        mllm.vit_flops() - mllm.vit_flops(projector=False)
        == count(lambda: mllm.project(states)) / 2
    )


def test_flops_of_a_pair_depend_on_its_alignment(mllm):
    for settings, vit, head in [
        ({}, 0, False),
        (dict(pairs=True), mllm.vit_flops(projector=False), True),
        (dict(pairs=True, target="projector"), mllm.vit_flops(), True),
    ]:
        model = aligned(mllm, **settings)
        image, pair = (flops_by_part(model, 32, 20, image=image) for image in (True, False))
        assert (image["ViT"], pair["ViT"]) == (mllm.vit_flops(), vit)
        assert (
            image["align"] == 3 * model.alignment.flops(64)
            and pair["align"] == head * image["align"]
        )


def test_dry_run_counts_the_head():
    paths = ["data.shards=shapes", "data.pairs=shapes", "run.init=null"]
    without, plan = (
        make_plan(load_config("iomm-b-512", [*paths, *more]), ranks=8)
        for more in ([], ["align.weight=0.5"])
    )
    assert (
        plan.parameters["align"] == 2 * (1536 * 1536 + 1536) + 1536 * 1024 + 1024
        and "align" not in without.parameters
    )
    assert plan.memory["masters"] - without.memory["masters"] == 4 * plan.parameters["align"] / 8
    assert "activations, align" in plan.memory and "activations, align" not in without.memory
    image = plan.flops.pop("align")
    assert plan.flops == without.flops and image == 3 * 2 * 1024 * (2 * 1536 * 1536 + 1536 * 1024)
    assert 0.004 < image / sum(without.flops.values()) < 0.005
    mix = load_config("iomm-b-512-finetune", [*paths, "align.weight=0.5"])
    assert work(build_without_weights(mix), mix)["align"] == image / 2


@pytest.mark.parametrize("target", ["vit", "projector"])
def test_dry_run_bytes_match_a_real_pass(target):
    from iomm.engine.shapes.mllm import WEIGHTS
    from iomm.model import IOMM
    from iomm.vae import load_vae

    config = load_config(
        PIXELS,
        [
            "mask.ratio=0.0",
            "precision=fp32",
            "data.size_px=32",
            "model.vae=pixel:4",
            "align.weight=1",
            f"align.target={target}",
        ],
    )
    counted = build_without_weights(config)
    mllm = load_mllm(str(WEIGHTS), dtype=torch.float32)
    head = AlignmentHead(config.align, 96, mllm)
    model = IOMM(
        counted.generator,
        counted.adapter,
        mllm,
        load_vae(config.model.vae),
        counted.recipe,
        alignment=head,
    )
    prepared = model.prepare(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), torch.arange(4))
    real = sum(
        x.nbytes for x in prepared.tensors() if x.is_floating_point() and x is not prepared.t_R
    )
    assert prepared_bytes(model, config, micro_batch=4) == real
    latents = torch.randn(4, 64, 96, requires_grad=True)
    own = {
        x.untyped_storage().data_ptr() for x in (*head.parameters(), latents, prepared.align_IND)
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alignment_loss(head(latents), prepared.align_IND)
    assert activation_bytes(model, config, micro_batch=4)["align"] == pytest.approx(
        sum(kept.values()), rel=0.02
    )


def test_muon_leaves_the_head_to_adamw(mllm):
    model = aligned(mllm)
    adamw, muon = (
        group["params"] for group in make_optimizer(model, OptimSection(kind="muon")).param_groups
    )
    assert {id(p) for p in model.alignment.parameters()} <= {id(p) for p in adamw} and muon


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["align.weight=-1"], "command line: align.weight must be >= 0, got -1.0"),
        (["align.block=-1"], "align.block must be >= 0, got -1"),
        (["align.target=clip"], "align.target must be one of vit, projector; got 'clip'"),
        (
            ["align.weight=0.5", "align.block=20"],
            "align.block must be at most 19, the generator's number of blocks, got 20",
        ),
        (
            ["align.weight=0.5", "train.data=pair"],
            "align.weight is 0.5, but no sample of this run is conditioned on its image: set",
        ),
        (
            ["align.weight=0.5", "train.data=mix", "data.mix=0"],
            "set align.pairs=true to align pairs, or align.weight=0",
        ),
    ],
)
def test_invalid_alignment_settings_are_rejected(overrides, message):
    with pytest.raises(InputError) as error:
        parse("", overrides=overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_default_block_is_a_third_of_the_depth():
    assert [AlignConfig().block_in(depth) for depth in (1, 2, 3, 4, 19, 30)] == [1, 1, 1, 2, 7, 10]
    assert AlignConfig(block=4).block_in(4) == 4
    pairs = ["align.weight=1", "align.pairs=true", "train.data=pair"]
    assert (
        parse("", overrides=pairs).align_share == 1
        and parse("", overrides=["train.data=mix"]).align_share == 0.5
    )


# Runs

RUNS = """
import sys
from iomm.alignment import AlignmentHead
from iomm.config import PRESETS, GeneratorConfig
from iomm.engine import loop
from iomm.engine.parallel import ranks as group
from iomm.engine.cli import main as iomm
from iomm.engine.config_parser import layered
from iomm.engine.launch import main as launch
group.stop = lambda: None     # DeepSpeed creates its groups once per process
PRESETS["demo"] = GeneratorConfig(width=64, num_heads=2, num_blocks=2)
root, *settings = sys.argv[1:]
on = "align.weight=0.5"
def run(name, *arguments):
    words = layered([f"run.dir={root}/{name}", *settings, *arguments])
    assert launch(words) == 0, name
run("mix", on)
run("again", on, "train.overlap=true", "--resume", f"{root}/mix/checkpoints/step-00000002")
run("whole", on, "train.micro_batch=4")
run("off")
run("dropped", "--init", f"{root}/mix")
every = ["align.pairs=true", "align.target=projector", "data.buckets=true"]
run("added", on, *every, "--init", f"{root}/off")
image = ["train.data=image", "data.pairs=null"]
config = f"{root}/off/config.yaml"
assert iomm(["cache", "--config", config, "--out", f"{root}/latents", *image]) == 0
run("cached", on, *image, f"data.latents={root}/latents", "train.recompute=1")
for command in (["export"], ["sample", "--num", "1", "--steps", "1"]):
    assert iomm([command[0], "--run", f"{root}/mix", *command[1:]]) == 0
forward, train_step, steps = AlignmentHead.forward, loop.train_step, []
nan = lambda: float("nan") if len(steps) == 2 else 1.0
AlignmentHead.forward = lambda self, x: forward(self, x) * nan()
loop.train_step = lambda *args: steps.append(1) or train_step(*args)
run("broken", on)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder with the runs of RUNS.

    They use one rank, ZeRO-3 and micro-batches of one image or one pair.
    """
    folder = tmp_path_factory.mktemp("align")
    dataset = folder / "dataset"
    write_dataset(dataset, num_images=24, size_px=32, seed=1, shard_size=12)
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(folder), *settings(dataset)],
        cwd=ROOT,
        env=environment(),
        text=True,
        timeout=LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    (folder / "output.txt").write_text(done.stdout)
    return folder


def settings(dataset):
    return [
        "--config",
        PIXELS,
        f"data.shards={dataset}",
        f"data.pairs={dataset}",
        "train.data=mix",
        "train.steps=3",
        "train.global_batch=4",
        "train.micro_batch=1",
        "checkpoint.every_steps=2",
        "log.sample_images=0",
        "train.threads=1",
        "precision=fp32",
        "optim.kind=adamw",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "data.size_px=32",
        "model.vae=pixel:4",
        "ema.decay=0.9",
        "zero.stage=3",
    ]


def test_run_trains_the_head_and_logs_both_losses(runs):
    mix, whole, off = (rows(runs / name / "log.jsonl") for name in ("mix", "whole", "off"))
    assert len(mix) == 3 and all(
        row["align_loss"] is None and "align" not in row["time_s"] for row in off
    )
    assert all(0 < row["align_loss"] < 2 and row["time_s"]["align"] > 0 for row in mix)
    assert mix[0]["loss"] == off[0]["loss"] and mix[-1]["loss"] != off[-1]["loss"]
    assert (
        mix[0]["grad_norm"] > off[0]["grad_norm"] and mix[-1]["align_loss"] < mix[0]["align_loss"]
    )
    # The losses do not depend on the micro-batch.
    for one, other in zip(mix, whole, strict=True):
        for key in ("loss", "align_loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert all(
        0 < row["align_loss"] < 2
        for name in ("added", "cached")
        for row in rows(runs / name / "log.jsonl")
    )


def test_resumed_run_is_bitwise_equal(runs):
    mix, again = (rows(runs / name / "log.jsonl")[-1] for name in ("mix", "again"))
    assert all(mix[key] == again[key] for key in ("step", "loss", "align_loss", "grad_norm"))
    assert hashes(runs / "mix") == hashes(runs / "again")
    slots = checkpoint_reader.Reader(checkpoint_reader.newest(runs / "mix/checkpoints")).file(0)[1]
    assert {
        f"{slot}/alignment.linear_in.weight" for slot in ("master", "ema", "exp_avg", "exp_avg_sq")
    } <= set(slots)


def test_sampling_export_and_init_drop_the_head(runs, monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", GeneratorConfig(width=64, num_heads=2, num_blocks=2))
    for name in ("mix", "added"):
        config, model, _ = load_run(runs / name)
        assert config.align.weight and model.alignment is None
    files = list((runs / "mix/export/ema").iterdir())
    assert files and not any(
        "align" in path.name or b"alignment" in path.read_bytes() for path in files
    )
    shapes = {
        name: checkpoint_reader.read_manifest(
            checkpoint_reader.newest(runs / name / "checkpoints")
        )["shapes"]
        for name in ("mix", "dropped", "off", "added")
    }
    assert (
        shapes["dropped"]
        == shapes["off"]
        == without_head(shapes["mix"])
        == without_head(shapes["added"])
    )
    assert len(shapes["mix"]) == len(shapes["off"]) + 6 == len(shapes["added"])


def test_nonfinite_alignment_loss_skips_the_step(runs):
    broken, mix = (rows(runs / name / "log.jsonl") for name in ("broken", "mix"))
    assert [row["skipped_steps"] for row in broken] == [0, 1, 1] and broken[1]["grad_norm"] is None
    assert (
        math.isnan(broken[1]["align_loss"])
        and broken[1]["loss"] == mix[1]["loss"]
        and broken[2]["grad_norm"] > 0
    )
    line = next(
        line
        for line in (runs / "output.txt").read_text().splitlines()
        if "step 2 skipped on all ranks" in line
    )
    # The two images of the step.
    assert len(json.loads(f"[{line.partition('not finite: ')[2]}]")) == 2


@pytest.mark.slow
def test_two_ranks_when_one_has_only_pairs(runs, tmp_path):
    """Train and resume when each micro-batch is an image on one rank and a pair on the other.

    No rank may hang.
    """
    given = [*settings(runs / "dataset"), "align.weight=0.5"]
    done = start(2, f"run.dir={tmp_path / 'two'}", *given)
    assert done.returncode == 0, done.stdout
    done = start(
        2,
        f"run.dir={tmp_path / 'again'}",
        *given,
        "train.overlap=true",
        "--resume",
        f"{tmp_path}/two/checkpoints/step-00000002",
    )
    assert done.returncode == 0 and hashes(tmp_path / "two") == hashes(tmp_path / "again"), (
        done.stdout
    )
    done = start(1, f"run.dir={tmp_path / 'one'}", *given)
    assert done.returncode == 0, done.stdout
    for one, two in zip(
        *(rows(tmp_path / name / "log.jsonl") for name in ("one", "two")), strict=True
    ):
        for key in ("loss", "align_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
