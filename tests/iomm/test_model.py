"""Algorithm 1 end to end: the loss is a pure function of the sample.

Also gradients, mixed batches of images and pairs, and FLOPs.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_models import SIZE, build, pixels

from iomm.adapter import QueryAdapter
from iomm.config import RECONSTRUCT, AdapterConfig, InputError, MaskConfig, PromptConfig
from iomm.flops import flops_by_part
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.kernels.philox import CAPTION_DROP, TIME, uniform
from iomm.masking import visible_mask
from iomm.mllm import IMAGE, TURN
from iomm.pipeline import sample_pixels


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(kind="metaquery"),
        dict(attention="bidirectional"),
        dict(mode="zero"),
        dict(conditions="all"),
        dict(conditions="all", mode="zero"),
        dict(conditions="all", kind="none"),
        dict(connector_layers=2),
        dict(connector_layers=1, conditions="all"),
        dict(generator="single_stream"),
        dict(generator="single_stream", conditions="all", mode="zero"),
    ],
    ids=str,
)
def test_loss_of_a_sample_does_not_depend_on_its_batch(mllm, settings):
    model = build(mllm, **settings)
    n_B = torch.arange(100, 104)
    _, whole_B, t_B = model(*pixels(n_B), n_B)
    for i, n in enumerate(n_B):
        _, alone_B, t = model(*pixels([n]), n[None])
        assert torch.equal(t, t_B[i : i + 1])
        assert torch.allclose(alone_B, whole_B[i : i + 1], rtol=1e-5)
    again = model(*pixels(n_B), n_B)[1]
    assert torch.equal(again, whole_B)


def test_single_stream_pads_ragged_conditions(mllm):
    model = build(mllm, generator="single_stream", conditions="all")
    n_B = torch.arange(4)
    loss, _, _ = model(*pixels(n_B), n_B)
    loss.backward()
    assert torch.isfinite(loss) and model.generator.condition_pad_1D.grad.abs().max() > 0


def test_guidance_with_ragged_conditions(mllm):
    """Images of prompts of three lengths equal the images sampled alone.

    The generator is conditioned on all outputs, with guidance.
    """
    model = build(mllm, conditions="all").eval()
    texts = ["", "one", RECONSTRUCT]
    together = sample_pixels(
        model, mllm.condition(texts), torch.arange(3), size_px=SIZE, steps=2, guidance=3.0
    )
    for i, text in enumerate(texts):
        alone = sample_pixels(
            model, mllm.condition([text]), torch.tensor([i]), size_px=SIZE, steps=2, guidance=3.0
        )
        assert torch.allclose(alone[0], together[i], atol=1e-4)


def test_mixed_batch_equals_separate_batches(mllm):
    """In a mixed batch, each sample has the loss that it has in a batch of only its kind."""
    model, n_B = build(mllm), torch.arange(6)
    has_image = [True, False, False, True, False, True]
    captions = ["" if image else f"{n} red circles" for n, image in enumerate(has_image)]
    vae_pixels, vit_pixels = pixels(n_B)
    chosen = torch.tensor(has_image)
    _, together_B, _ = model(vae_pixels, vit_pixels[chosen], n_B, None, captions, has_image)
    _, images_B, _ = model(vae_pixels[chosen], vit_pixels[chosen], n_B[chosen])
    texts = [caption for caption in captions if caption]
    _, pairs_B, _ = model(
        vae_pixels[~chosen], vit_pixels[:0], n_B[~chosen], None, texts, [False] * 3
    )
    assert torch.allclose(together_B[chosen], images_B, rtol=1e-5) and torch.allclose(
        together_B[~chosen], pairs_B, rtol=1e-5
    )


def test_mixed_batch_runs_each_part_once_without_padding(mllm, monkeypatch):
    """Each module runs once per mixed batch, without padding.

    The ViT runs only on images, the decoder's prefix exactly on the tokens of each sample, and the
    generator on all samples.
    """
    model, n_B, ran = build(mllm), torch.arange(6), []
    has_image = [True, False, False, True, False, True]
    captions = ["" if image else "a red circle " * n for n, image in enumerate(has_image)]
    vae_pixels, vit_pixels = pixels(n_B)

    def counted(owner, name, size):
        work = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *args, **kwargs: ran.append((name, size(*args))) or work(*args, **kwargs),
        )

    counted(mllm, "image_tokens", lambda vit: len(vit))
    counted(mllm, "prefix", lambda condition, *_: len(condition.tokens_TD))
    counted(mllm, "queries", lambda queries, *_: tuple(queries.shape[:2]))
    counted(model, "velocity", lambda noisy, *_: len(noisy))
    model(vae_pixels, vit_pixels[torch.tensor(has_image)], n_B, None, captions, has_image)
    visible = visible_mask(
        model.recipe.mask, 3, n_B[torch.tensor(has_image)], mllm.num_image_tokens
    )
    fixed = len(mllm.token_ids(TURN[0] + RECONSTRUCT + IMAGE[0] + IMAGE[1] + TURN[1]))
    dropped = (uniform(3, CAPTION_DROP, n_B, 1)[:, 0] < 0.1).tolist()
    texts = [
        "" if drop else caption
        for caption, image, drop in zip(captions, has_image, dropped, strict=True)
        if not image
    ]
    tokens = (
        3 * fixed
        + int(visible.sum())
        + sum(len(mllm.token_ids(TURN[0] + text + TURN[1])) for text in texts)
    )
    assert ran == [("image_tokens", 3), ("prefix", tokens), ("queries", (6, 8)), ("velocity", 6)]


def test_captions_are_dropped_only_from_pairs(mllm):
    model, n_B, has_image = build(mllm), torch.arange(4), [True, False, True, False]
    vit_pixels = pixels(n_B)[1][torch.tensor(has_image)]
    model.recipe = replace(model.recipe, caption_drop=1.0)
    bare = (
        model.condition(vit_pixels, n_B, ["", "a red circle", "", "two"], has_image)
        .offsets.diff()
        .tolist()
    )
    model.recipe = replace(model.recipe, caption_drop=0.0)
    kept = (
        model.condition(vit_pixels, n_B, ["", "a red circle", "", "two"], has_image)
        .offsets.diff()
        .tolist()
    )
    empty = len(mllm.condition([""]).tokens_TD)
    assert [bare[0], bare[2]] == [kept[0], kept[2]] and bare[1] == bare[3] == empty < min(kept)


def test_default_prompts_are_the_texts_of_the_paper(mllm):
    model, n_B = build(mllm), torch.arange(3)
    image_tokens = mllm.image_tokens(pixels(n_B[:1])[1])
    visible = visible_mask(model.recipe.mask, model.recipe.seed, n_B[:1], mllm.num_image_tokens)
    model.recipe = replace(model.recipe, caption_drop=0.0)
    has_image = [True, False, False]
    condition = model.condition(None, n_B, ["", "two", ""], has_image, image_tokens)
    texts = ["Generate an image that is identical to the reference image:", "two", ""]
    expected = mllm.condition(texts, image_tokens, has_image=has_image, visible=visible)
    assert torch.equal(condition.tokens_TD, expected.tokens_TD)


def test_prompts_are_configuration(mllm):
    prompt = PromptConfig(reconstruct=("a", "b b"), caption="Draw {caption}!", empty="nothing")
    model, n_B = build(mllm), torch.arange(400)
    model.recipe = replace(model.recipe, prompt=prompt, caption_drop=0.5)
    drawn = model.reconstruct_prompts(n_B)
    assert set(drawn) == {"a", "b b"} and 160 < drawn.count("a") < 240
    # A prompt is a function of the sample, not of its batch.
    assert model.reconstruct_prompts(n_B[100:103]) == drawn[100:103]
    lengths = {
        text: len(mllm.condition([text]).tokens_TD) for text in ("Draw two!", "nothing", "a", "b b")
    }
    condition = model.condition(None, n_B, ["two"] * 400, [False] * 400)
    pairs = condition.offsets.diff().tolist()
    assert set(pairs) == {lengths["Draw two!"], lengths["nothing"]}
    image_tokens = mllm.image_tokens(pixels(n_B[:4])[1])
    images = model.condition(None, n_B[:4], None, None, image_tokens).offsets.diff()
    visible = visible_mask(model.recipe.mask, model.recipe.seed, n_B[:4], mllm.num_image_tokens)
    extra = len(mllm.token_ids("".join(IMAGE)))
    text_tokens = torch.tensor([lengths[text] for text in drawn[:4]])
    assert torch.equal(images, text_tokens + visible.view(4, -1).sum(1) + extra)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(reconstruct=()), "prompt.reconstruct must be one or more texts"),
        (dict(reconstruct=("a", "")), "prompt.reconstruct must be one or more texts"),
        (dict(caption="Generate:"), "prompt.caption must contain {caption} exactly once"),
    ],
)
def test_invalid_prompts_are_refused(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        PromptConfig(**settings)


def test_captions_are_tokenized_in_the_chat_format(mllm):
    """A caption's condition has the tokens that the checkpoint's chat template gives.

    The template is the one of InternVL checkpoints converted by transformers, reduced to text. It
    is applied to one user turn.
    """
    mllm.tokenizer.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
        "{{ message['content'] }}{{'<|im_end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
    )
    turn = [{"role": "user", "content": 'two blue squares, "left" of a red one'}]
    ids = mllm.tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    condition = mllm.condition([turn[0]["content"]])
    assert torch.equal(condition.tokens_TD, mllm.backbone.get_input_embeddings()(torch.tensor(ids)))
    assert condition.positions_T.tolist() == list(range(len(ids)))


def test_captions_are_dropped_per_sample_at_the_set_rate(mllm):
    model, n_B = build(mllm), torch.arange(400)
    condition = model.condition(torch.empty(0, 3, 32, 32), n_B, ["a b c"] * 400, [False] * 400)
    empty = len(mllm.condition([""]).tokens_TD)
    dropped = condition.offsets.diff() == empty
    # 40 are expected, with a standard deviation of 6.
    assert 20 <= int(dropped.sum()) <= 60
    half = model.condition(torch.empty(0, 3, 32, 32), n_B[200:], ["a b c"] * 200, [False] * 200)
    assert torch.equal(half.offsets.diff() == empty, dropped[200:])


def test_two_ranks_draw_the_same_numbers_as_one(mllm):
    one, mask, seed = torch.arange(32, 48), MaskConfig(ratio=0.6), 11
    latents = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for two in (one[:8], one[8:]):
        rows = two - 32
        t, whole_t = uniform(seed, TIME, two, 1), uniform(seed, TIME, one, 1)
        assert torch.equal(t, whole_t[rows])
        assert torch.equal(
            visible_mask(mask, seed, two, 16).view(8, 16),
            visible_mask(mask, seed, one, 16).view(16, 16)[rows],
        )
        half, whole = (
            noisy_tokens(latents[n - 32], uniform(seed, TIME, n, 1)[:, 0], seed, n, 2)
            for n in (two, one)
        )
        assert all(torch.equal(h, w[rows]) for h, w in zip(half, whole, strict=True))


def test_gradients_reach_only_trained_parameters(mllm):
    model, n_B = build(mllm), torch.arange(4)
    assert not any(name.startswith("frozen") for name, _ in model.named_parameters())
    model(*pixels(n_B), n_B)[0].backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for name, p in model.named_parameters()
        # A bias shared by all keys cancels in the softmax.
        if not name.endswith(("to_k.bias",))
    )
    assert all(p.grad is None for p in mllm.parameters())


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_loss_is_finite_at_mask_ratios_zero_and_one(mllm, ratio):
    model, n_B = build(mllm, ratio=ratio), torch.arange(3)
    loss, _, _ = model(*pixels(n_B), n_B)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.adapter.queries_QD.grad).all()


def test_fresh_adapter_outputs_have_token_scale(mllm):
    adapter = QueryAdapter(AdapterConfig(num_queries=8, head_dim=16), mllm.width)
    adapter.init_weights(0)
    condition = mllm.condition(
        [RECONSTRUCT], 100 * torch.randn(1, mllm.num_image_tokens, mllm.width)
    )
    table = mllm.backbone.get_input_embeddings().weight
    ratio = adapter(condition).std() / table.std()
    assert 0.5 * mllm.width**-0.5 / table.std() < ratio < 2 * mllm.width**-0.5 / table.std()
    assert torch.equal(adapter(condition)[0], adapter.queries_QD)


def test_flops_match_the_flop_counter(mllm):
    model = build(mllm, ratio=0.0)
    visible = torch.ones(mllm.num_image_tokens, dtype=torch.bool)
    vit = torch.randn(1, 3, 32, 32)

    def count(work):
        # The counter does not know the CPU's fused attention. The math backend's is two products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = work()
        return counter.get_total_flops(), result

    flops, tokens = count(lambda: mllm.image_tokens(vit))
    assert flops == pytest.approx(mllm.vit_flops(), rel=0.01)
    condition = mllm.condition([RECONSTRUCT], tokens, visible=visible)
    num_prefix = len(condition.tokens_TD)
    flops, (cache, _) = count(lambda: mllm.prefix(condition))
    prefix, forward, backward = mllm.decoder_flops(num_prefix, 8)
    assert flops == pytest.approx(prefix, rel=0.01)
    flops, queries = count(lambda: model.adapter(condition))
    assert flops == pytest.approx(model.adapter.flops(num_prefix), rel=0.01)
    queries = queries.detach().requires_grad_()
    flops, hidden = count(lambda: mllm.queries(queries, condition, cache))
    assert flops == pytest.approx(forward, rel=0.01)
    flops, _ = count(lambda: hidden.sum().backward())
    # The torch backend pads prefix and suffix into one tensor, so it also computes the prefix's
    # gradients, which are not used.
    unused = 3 * 8 * num_prefix * 4 * mllm.width
    assert flops == pytest.approx(backward + unused, rel=0.01)


@pytest.mark.parametrize(
    "settings", [{}, dict(conditions="all"), dict(connector_layers=1)], ids=str
)
def test_noise_draws_share_one_condition(mllm, settings):
    """Draw k of sample n uses the time and noise of number n x draws + k.

    All draws share the condition of n, which is computed once. The loss is the mean over draws.
    """
    model, n_B, ran = build(mllm, **settings), torch.arange(5, 8), []
    inputs = pixels(n_B)
    recipes = {k: replace(model.recipe, noise_draws=k) for k in (1, 3)}
    model.recipe = recipes[3]
    loss, loss_R, t_R = model(*inputs, n_B)
    model.recipe = recipes[1]
    n_R = (n_B[:, None] * 3 + torch.arange(3)).flatten()
    assert (
        torch.equal(t_R, uniform(3, TIME, n_R, 1)[:, 0])
        and loss_R.shape == (9,)
        and torch.allclose(loss, loss_R.mean())
    )
    hidden = model.encode_condition(model.condition(inputs[1], n_B))
    for k in range(3):
        n_B_of_draw = n_B * 3 + k
        noisy_BNK, target_BNK = noisy_tokens(inputs[0], t_R[k::3], 3, n_B_of_draw, 4)
        velocity_BNK = model.velocity(noisy_BNK, t_R[k::3], *hidden, (8, 8))
        wanted_B = (velocity_BNK - target_BNK).square().flatten(1).mean(1)
        assert torch.allclose(loss_R[k::3], wanted_B, rtol=1e-5)
    model.recipe, queries = recipes[3], mllm.queries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mllm,
            "queries",
            lambda x, *args, **kwargs: ran.append(len(x)) or queries(x, *args, **kwargs),
        )
        model(*inputs, n_B)
    assert ran == [3]
    parts = {}
    for k in (1, 3):
        model.recipe = recipes[k]
        parts[k] = flops_by_part(model, SIZE)
    assert {part for part in parts[1] if parts[1][part] != parts[3][part]} == {"generator"}
    assert parts[3]["generator"] == 3 * parts[1]["generator"]
