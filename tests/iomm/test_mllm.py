"""The two passes of the MLLM against transformers' forward pass with an attention mask."""

import pytest
import torch
from toy_models import TEXT, VISION

from iomm.config import RECONSTRUCT, InputError
from iomm.engine.shapes.mllm import create_mllm
from iomm.internvl import load_mllm
from iomm.kernels.image_patches import normalised
from iomm.mllm import IMAGE_MEAN, IMAGE_STD

Q = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return create_mllm(
        tmp_path_factory.mktemp("mllm") / "tiny",
        texts=[RECONSTRUCT, "a red circle"],
        vision=VISION,
        text=TEXT,
    )


@pytest.fixture(scope="module")
def mllm(folder):
    return load_mllm(str(folder), dtype=torch.float64)


def literal(mllm, texts, image_tokens, has_image, visible, queries_BQD, causal):
    """Run Algorithm 1 literally: whole sequences through transformers' forward pass.

    Hidden tokens are excluded by a 4D mask.
    """
    batch, num_image = len(texts), mllm.num_image_tokens
    rows, keeps, images = [], [], iter(range(batch))
    for text, image in zip(texts, has_image, strict=True):
        before = mllm.token_ids("<|im_start|>user\n" + text + ("<img>" if image else ""))
        after = mllm.token_ids(("</img>" if image else "") + "<|im_end|>\n<|im_start|>assistant\n")
        embed = mllm.backbone.get_input_embeddings()
        parts, keep = [embed(torch.tensor(before))], [True] * len(before)
        if image:
            i = next(images)
            parts.append(image_tokens[i])
            keep += visible[i * num_image : (i + 1) * num_image].tolist()
        parts.append(embed(torch.tensor(after)))
        rows.append(torch.cat(parts))
        keeps.append(keep + [True] * len(after))
    hidden = []
    for row, keep, queries_QD in zip(rows, keeps, queries_BQD, strict=True):
        x = torch.cat((row, queries_QD))[None]
        length = x.shape[1]
        see = torch.ones(length, length, dtype=torch.bool).tril()
        if not causal:
            see[-Q:, -Q:] = True
        see &= torch.tensor(keep + [True] * Q)[None]
        # A hidden row may attend to itself, as no other row attends to it.
        see |= torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(1, 1, length, length, dtype=x.dtype).masked_fill(
            ~see, torch.finfo(x.dtype).min
        )
        out = mllm.backbone.language_model(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
            use_cache=False,
        ).last_hidden_state
        hidden.append(out[0, -Q:])
    return torch.stack(hidden)


@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.85, 0.95, 1.0])
@pytest.mark.parametrize(
    "batch, kinds",
    [(1, "image"), (2, "image"), (3, "mixed"), (5, "mixed"), (4, "text"), (4, "edit")],
)
def test_split_pass_equals_transformers_forward(mllm, ratio, batch, kinds):
    generator = torch.Generator().manual_seed(batch)
    has_image = [
        kinds in ("image", "edit") or (kinds == "mixed" and b % 2 == 0) for b in range(batch)
    ]
    texts = [RECONSTRUCT if image else "a red circle" * b for b, image in enumerate(has_image)]
    if kinds == "edit":
        texts = ["make it red " * b for b in range(batch)]
    num_images = sum(has_image)
    visible = torch.rand(num_images * mllm.num_image_tokens, generator=generator) >= ratio
    tokens = None
    if num_images:
        tokens = mllm.image_tokens(
            torch.randn(num_images, 3, 32, 32, generator=generator, dtype=torch.float64)
        )
    queries = torch.randn(
        batch, Q, mllm.width, generator=generator, dtype=torch.float64, requires_grad=True
    )
    weight = torch.randn(batch, Q, mllm.width, generator=generator, dtype=torch.float64)
    for causal in (True, False):
        condition = mllm.condition(texts, tokens, has_image=has_image, visible=visible)
        ours = mllm.queries(queries, condition, mllm.prefix(condition)[0], causal=causal)
        (ours * weight).sum().backward()
        ours_grad, queries.grad = queries.grad, None
        theirs = literal(mllm, texts, tokens, has_image, visible, queries, causal)
        (theirs * weight).sum().backward()
        theirs_grad, queries.grad = queries.grad, None
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
        assert (ours_grad - theirs_grad).abs().max() <= 1e-12 * theirs_grad.abs().max()


def test_prefix_outputs_equal_transformers_forward(mllm):
    """Test adapter.conditions=all as in the text of Algorithm 1.

    Hidden tokens are multiplied by zero, and every output is returned.
    """
    tokens = mllm.image_tokens(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    visible = torch.arange(2 * mllm.num_image_tokens) % 3 == 0
    queries = torch.randn(2, Q, mllm.width, dtype=torch.float64, requires_grad=True)
    condition = mllm.condition([RECONSTRUCT] * 2, tokens, visible=visible, mode="zero")
    cache, outputs = mllm.prefix(condition, outputs=True)
    ours = torch.cat(
        (outputs.view(2, -1, mllm.width), mllm.queries(queries, condition, cache)), dim=1
    )
    whole = torch.cat((condition.tokens_TD.view(2, -1, mllm.width), queries), dim=1)
    theirs = mllm.backbone.language_model(inputs_embeds=whole, use_cache=False).last_hidden_state
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    weight = torch.randn_like(theirs)
    grads = [torch.autograd.grad((out * weight).sum(), queries)[0] for out in (ours, theirs)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-12 * grads[1].abs().max()


def test_qwen3_decoder_equals_transformers_forward(tmp_path):
    """InternVL3.5's decoder normalises queries and keys and has a separate head dim."""
    create_mllm(
        tmp_path / "m",
        texts=["a b"],
        vision=VISION,
        text={"model_type": "qwen3", "head_dim": 24, **TEXT},
    )
    mllm = load_mllm(str(tmp_path / "m"), dtype=torch.float64)
    internvl = mllm.backbone
    condition = mllm.condition(["a bb ccc", "a bb ccc"])
    queries = torch.randn(2, Q, mllm.width, dtype=torch.float64)
    ours = mllm.queries(queries, condition, mllm.prefix(condition)[0])
    whole = torch.cat((condition.tokens_TD.view(2, -1, mllm.width), queries), dim=1)
    theirs = internvl.language_model(inputs_embeds=whole, use_cache=False).last_hidden_state[:, -Q:]
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_image_tokens_equal_transformers(mllm):
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        theirs = mllm.backbone.get_image_features(pixels).pooler_output
    assert torch.equal(mllm.image_tokens(pixels), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_byte_embeddings_match_normalised_pixels(folder, dtype):
    """On a CPU, embeddings of bytes and of normalised pixels are bitwise equal.

    Patch rows and one matrix product, as on a GPU, are within twice the convolution's own error.
    """
    mllm, random = load_mllm(str(folder), dtype=dtype), torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (3, mllm.vit_px, mllm.vit_px, 3), generator=random, dtype=torch.uint8
    )
    floats, embeddings = (
        normalised(pixels, IMAGE_MEAN, IMAGE_STD),
        mllm.backbone.vision_tower.embeddings,
    )
    assert torch.equal(mllm.vit_states(pixels), mllm.vit_states(floats))
    same, got = embeddings(floats.to(dtype)), mllm.embed_bytes(pixels)
    exact = embeddings.double()(floats.to(dtype).double())
    budget = 2 * (same.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (
        got.dtype == dtype
        and got.shape == same.shape
        and (got.double() - exact).abs().max() <= budget
    )


def test_mode_zero_keeps_hidden_tokens_as_zeros(mllm):
    tokens = torch.randn(2, mllm.num_image_tokens, mllm.width, dtype=torch.float64)
    visible = torch.arange(2 * mllm.num_image_tokens) % 3 == 0
    zeroed = mllm.condition(["", "x"], tokens, visible=visible, mode="zero")
    plain = mllm.condition(["", "x"], (tokens.flatten(0, 1) * visible[:, None]).view_as(tokens))
    assert torch.equal(zeroed.tokens_TD, plain.tokens_TD) and torch.equal(
        zeroed.positions_T, plain.positions_T
    )


def test_positions_have_gaps_or_are_compact(mllm):
    tokens = torch.randn(1, mllm.num_image_tokens, mllm.width, dtype=torch.float64)
    visible = torch.zeros(mllm.num_image_tokens, dtype=torch.bool)
    visible[[2, 5]] = True
    gapped = mllm.condition([""], tokens, visible=visible)
    compact = mllm.condition([""], tokens, visible=visible, positions="compact")
    start = len(mllm.token_ids("<|im_start|>user\n<img>"))
    assert gapped.positions_T[start : start + 2].tolist() == [start + 2, start + 5]
    assert int(gapped.end_B) == int(gapped.positions_T[-1]) + 1
    assert compact.positions_T.tolist() == list(range(len(compact.tokens_TD))) and int(
        compact.end_B
    ) == len(compact.tokens_TD)


def test_prefix_has_no_graph_and_stays_frozen(mllm):
    mllm.train()
    assert not any(module.training for module in mllm.modules())
    assert not any(p.requires_grad for p in mllm.parameters())
    condition = mllm.condition(["a red circle"])
    assert not any(k.requires_grad or v.requires_grad for k, v in mllm.prefix(condition)[0])


def test_errors_state_what_was_expected(mllm, tmp_path):
    with pytest.raises(InputError, match=r"context of 256\. Shorten the prompt"):
        mllm.condition(["a red circle " * 200])
    with pytest.raises(InputError, match="no folder"):
        load_mllm(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"is a bert checkpoint\. Expected InternVL"):
        load_mllm(str(tmp_path))


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_condition_end_is_the_largest_position(mllm, positions):
    tokens, visible = (
        torch.randn(2, mllm.num_image_tokens, mllm.width, dtype=torch.float64),
        torch.arange(128) % 5 == 0,
    )
    condition = mllm.condition(
        ["a red circle" * 3, "", "a"],
        tokens,
        has_image=[False, True, True],
        visible=visible[: 2 * mllm.num_image_tokens],
        positions=positions,
    )
    assert condition.end == int(condition.end_B.max())
