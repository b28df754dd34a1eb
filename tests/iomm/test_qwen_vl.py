"""Qwen2.5-VL as the MLLM against the prompts of diffusers' Qwen-Image pipelines.

Everything runs on a tiny random model of the same class.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_models import qwen_pipeline, qwen_vl

from iomm.config import AdapterConfig, InputError
from iomm.internvl import load_mllm, mllm_without_weights
from iomm.kernels.image_patches import normalised
from iomm.mllm import MLLM
from iomm.model import pad_outputs
from iomm.qwen_vl import IMAGE_MEAN, IMAGE_STD, SYSTEM, QwenVL, patch_rows

# 5 x 5 image tokens in windows of 4 x 4, so that some windows are cut.
VIT_PX = 140
TEXTS = ["a red circle", " ", "a blue\n\nsquare on top of a green one"]


@pytest.fixture(scope="module")
def pipeline():
    return qwen_pipeline()


@pytest.fixture(scope="module")
def mllm(pipeline):
    return QwenVL(pipeline.text_encoder.model, pipeline.tokenizer, VIT_PX)


def vit_pixels(num):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, VIT_PX, VIT_PX, 3), generator=generator, dtype=torch.uint8)


def generator_condition(mllm, condition):
    """Return what the generator reads with adapter none: (B, C, D) and lengths or None."""
    cache, outputs_TD = mllm.prefix(condition, outputs=True, cached=False)
    assert cache == []
    return pad_outputs(outputs_TD, condition, None)


class EditProcessor:
    """The calls of Qwen2_5_VLProcessor that the edit pipeline makes.

    The class itself needs torchvision, for videos. Pixels are ours once they have been compared:
    they are normalised in float32 in both, but in another order.
    """

    def __init__(self, tokenizer):
        from transformers import Qwen2VLImageProcessorPil

        self.tokenizer, self.images = tokenizer, Qwen2VLImageProcessorPil()

    def __call__(self, text, images, padding, return_tensors):
        seen = self.images(images, return_tensors=return_tensors)
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
        rows = patch_rows(normalised(pixels, IMAGE_MEAN, IMAGE_STD), 14, 2, 2)
        # Measured: 4e-7.
        assert (rows - seen["pixel_values"]).abs().max() <= 1e-6
        seen["pixel_values"] = rows
        counts = (seen["image_grid_thw"].prod(-1) // 4).tolist()
        expanded = [
            one.replace("<|image_pad|>", "<|image_pad|>" * count)
            for one, count in zip(text, counts, strict=True)
        ]
        tokens = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        tokens.update(seen)
        return tokens


class Encoder(torch.nn.Module):
    """A text encoder that gets the token types, without which transformers 5 has no 3-axis ids.

    QwenImageEditPipeline of diffusers 0.42.1 does not pass them (diffusers #14194).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.dtype = model.dtype

    def forward(self, input_ids, **kwargs):
        types = (input_ids == self.model.config.image_token_id).int()
        return self.model(
            input_ids=input_ids,
            mm_token_type_ids=types,
            **{**kwargs, "pixel_values": kwargs["pixel_values"].double()},
        )


def edit_embeds(pipeline, texts, pixels):
    """Return the prompt embeddings and the mask of QwenImageEditPipeline."""
    from diffusers import QwenImageEditPipeline

    edit = QwenImageEditPipeline(None, None, None, None, None, None)
    edit.text_encoder, edit.processor = (
        Encoder(pipeline.text_encoder),
        EditProcessor(pipeline.tokenizer),
    )
    images = [Image.fromarray(image.numpy()) for image in pixels]
    with torch.no_grad():
        return edit.encode_prompt(texts, images, device=torch.device("cpu"))


def assert_same(hidden, lengths, expected, mask):
    assert hidden.shape == expected.shape
    # Measured: 0, and 0.04 if the pipeline's encoder lacks the 3-axis positions of an image.
    assert (hidden - expected).abs().max() <= 1e-13 * expected.abs().max()
    assert (mask is None) == (lengths is None)
    if mask is not None:
        assert lengths.tolist() == mask.sum(1).tolist()


def test_system_texts_have_the_tokens_that_the_pipelines_drop(pipeline, mllm):
    """34 and 64, counted once with Qwen's vocabulary too."""
    from diffusers import QwenImageEditPipeline

    assert len(mllm.token_ids(SYSTEM[False])) == pipeline.prompt_template_encode_start_idx == 34
    edit = QwenImageEditPipeline(None, None, None, None, None, None)
    assert len(mllm.token_ids(SYSTEM[True])) == edit.prompt_template_encode_start_idx == 64
    assert QwenVL.num_skipped == {False: 34, True: 64}


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ["word " * 2000, "a"]])
def test_texts_equal_the_prompt_of_the_pipeline(pipeline, mllm, texts):
    with torch.no_grad():
        expected, mask = pipeline.encode_prompt(texts, device=torch.device("cpu"))
    hidden, lengths = generator_condition(mllm, mllm.condition(texts))
    assert_same(hidden, lengths, expected, mask)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_images_equal_the_prompt_of_the_edit_pipeline(pipeline, mllm, texts):
    pixels = vit_pixels(len(texts))
    expected, mask = edit_embeds(pipeline, texts, pixels)
    condition = mllm.condition(texts, mllm.image_tokens(pixels))
    assert condition.positions_T.shape == (3, len(condition.tokens_TD))
    hidden, lengths = generator_condition(mllm, condition)
    assert_same(hidden, lengths, expected, mask)


def test_image_tokens_equal_transformers(pipeline, mllm):
    pixels = vit_pixels(2)
    images = [Image.fromarray(image.numpy()) for image in pixels]
    seen = EditProcessor(pipeline.tokenizer)(["", ""], images, False, "pt")
    with torch.no_grad():
        theirs = pipeline.text_encoder.model.get_image_features(
            seen["pixel_values"].double(), image_grid_thw=seen["image_grid_thw"]
        ).pooler_output
    ours = mllm.image_tokens(pixels)
    assert ours.shape == (2, mllm.num_image_tokens, mllm.width) == (2, 25, 64)
    assert torch.equal(ours, torch.stack(theirs))


def literal(mllm, texts, tokens_IPD, visible):
    """Return the outputs of transformers' decoder over whole turns, where hidden tokens are masked.

    Positions come from get_rope_index.
    """
    model, rows = mllm.backbone, []
    image_token = model.config.image_token_id
    for i, text in enumerate(texts):
        before, after, skipped = mllm.turn(text, True)
        ids = torch.tensor([before + [image_token] * mllm.num_image_tokens + after])
        types = (ids == image_token).int()
        side = VIT_PX // 14
        positions, _ = model.get_rope_index(
            ids, types, image_grid_thw=torch.tensor([[1, side, side]])
        )
        x = model.get_input_embeddings()(ids).masked_scatter(types[..., None].bool(), tokens_IPD[i])
        length = x.shape[1]
        keep = torch.ones(length, dtype=torch.bool)
        keep[len(before) : len(before) + mllm.num_image_tokens] = visible[i]
        see = torch.ones(length, length, dtype=torch.bool).tril() & keep
        # A hidden row may attend to itself, as no other row attends to it.
        see |= torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(1, 1, length, length, dtype=x.dtype).masked_fill(
            ~see, torch.finfo(x.dtype).min
        )
        out = model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        rows.append(out[0][keep][skipped:])
    return rows


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.85, 1.0])
def test_dropped_image_tokens_equal_an_attention_mask(mllm, ratio):
    tokens = mllm.image_tokens(vit_pixels(3))
    visible = torch.rand(3, 25, generator=torch.Generator().manual_seed(1)) >= ratio
    condition = mllm.condition(TEXTS, tokens, visible=visible.flatten())
    hidden, lengths = generator_condition(mllm, condition)
    with torch.no_grad():
        expected = literal(mllm, TEXTS, tokens, visible)
    assert lengths.tolist() == [len(row) for row in expected]
    for got, row in zip(hidden, expected, strict=True):
        # Measured: 0.
        assert (got[: len(row)] - row).abs().max() <= 1e-13 * row.abs().max()
        assert not got[len(row) :].any()


def test_queries_continue_after_the_largest_position(mllm):
    """The other adapters work as with InternVL: queries follow the turn on all three axes."""
    model, tokens = mllm.backbone, mllm.image_tokens(vit_pixels(1))
    queries = torch.randn(1, 7, mllm.width, dtype=torch.float64, requires_grad=True)
    condition = mllm.condition(TEXTS[:1], tokens)
    assert condition.end == int(condition.positions_T.max()) + 1 == int(condition.end_B)
    ours = mllm.queries(queries, condition, mllm.prefix(condition)[0])
    positions = torch.cat(
        (condition.positions_T, condition.end + torch.arange(7).expand(3, -1)), dim=1
    )
    theirs = model.language_model(
        inputs_embeds=torch.cat((condition.tokens_TD[None], queries), dim=1),
        position_ids=positions[:, None],
        use_cache=False,
    ).last_hidden_state[:, -7:]
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    weight = torch.randn_like(theirs)
    mine, other = (torch.autograd.grad((out * weight).sum(), queries)[0] for out in (ours, theirs))
    assert (mine - other).abs().max() <= 1e-12 * other.abs().max()


def test_mixed_batches_keep_their_own_turns(mllm):
    tokens = mllm.image_tokens(vit_pixels(1))
    both = mllm.condition(TEXTS[:2], tokens, has_image=[False, True])
    alone = mllm.condition(TEXTS[:1]), mllm.condition(TEXTS[1:2], tokens)
    assert both.skipped == (34, 64)
    expected = torch.cat([one.positions_T for one in alone], dim=1)
    assert torch.equal(both.positions_T, expected)
    assert torch.equal(both.tokens_TD, torch.cat([one.tokens_TD for one in alone]))
    assert both.end_B.tolist() == [one.end for one in alone]


@pytest.mark.parametrize("px", [112, 140])
def test_vit_flops_match_pytorch_flop_counter(pipeline, px):
    mllm = QwenVL(pipeline.text_encoder.model, pipeline.tokenizer, px)
    pixels = torch.zeros(1, px, px, 3, dtype=torch.uint8)
    # PyTorch does not count the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        mllm.image_tokens(pixels)
    assert mllm.vit_flops() == counter.get_total_flops()


def test_checkpoints_load_from_folders_and_pipelines(tmp_path):
    model, tokenizer = qwen_vl(torch.float32)
    model.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "pipeline" / "tokenizer")
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    for name in ("pipeline", "whole"):
        mllm = load_mllm(str(tmp_path / name), dtype=torch.float32, vit_px=VIT_PX)
        assert isinstance(mllm, QwenVL) and isinstance(mllm, MLLM)
        assert mllm.num_image_tokens == 25 and mllm.token_ids("a b")
        for got, expected in zip(mllm.parameters(), model.model.parameters(), strict=True):
            assert torch.equal(got, expected)
    empty = mllm_without_weights(str(tmp_path / "whole"))
    assert empty.num_image_tokens == 256 and empty.device.type == "meta"


def test_shape_of_the_checkpoint_is_known_without_a_network():
    mllm = mllm_without_weights("Qwen/Qwen-Image/text_encoder")
    text = sum(p.numel() for p in mllm.backbone.language_model.parameters())
    vision = sum(p.numel() for p in mllm.backbone.visual.parameters())
    # The 8.29 B of the checkpoint without the 545 M of its language-model head.
    assert (text, vision) == (7_070_619_136, 676_550_144)
    assert (mllm.width, mllm.num_image_tokens) == (3584, 256)


def test_fp8_replaces_layers_of_both_parts(pipeline):
    from iomm.layers import RoundedLinear

    mllm = QwenVL(qwen_vl(torch.float32)[0].model, pipeline.tokenizer, VIT_PX)
    exact = mllm.image_tokens(vit_pixels(1))
    mllm.use_fp8()
    rounded = [n for n, part in mllm.named_modules() if isinstance(part, RoundedLinear)]
    assert any(".visual." in n for n in rounded) and any(".language_model." in n for n in rounded)
    assert not any("merger" in n for n in rounded)
    assert (mllm.image_tokens(vit_pixels(1)) - exact).abs().max() < exact.abs().max()


def test_errors_state_what_was_expected(mllm, pipeline):
    tokens, visible = mllm.image_tokens(vit_pixels(1)), torch.ones(25, dtype=torch.bool)
    with pytest.raises(InputError, match=r"compact is undefined.*Set mask\.positions=original"):
        mllm.condition(["a"], tokens, visible=visible, positions="compact")
    with pytest.raises(InputError, match=r"vit_px must be a positive multiple of 28, got 100"):
        QwenVL(pipeline.text_encoder.model, pipeline.tokenizer, 100)
    with pytest.raises(InputError, match=r"context of 2048\. Shorten the prompt"):
        mllm.condition(["word " * 3000], tokens)
    with pytest.raises(InputError, match="kind none has no queries"):
        AdapterConfig(kind="none")
