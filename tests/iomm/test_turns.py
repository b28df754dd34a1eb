"""Turns packed on the host: the condition of whole turns without their hidden tokens."""

from dataclasses import replace

import pytest
import torch
from toy_models import build, pixels

from iomm.config import RECONSTRUCT, MaskConfig
from iomm.flow import loss_by_time
from iomm.masking import visible_mask
from iomm.mllm import IMAGE, TURN
from iomm.model import draw_turns

TEXTS = [RECONSTRUCT, "a red circle", "", "two"]
KINDS = {"images": [True] * 4, "mixed": [True, False, False, True], "texts": [False] * 4}


def whole_turns(mllm, texts, tokens_IPD, has_image, visible, mode, positions):
    """Return (tokens, positions, offsets, ends): all tokens are embedded, then some dropped."""
    embed, found, tokens_IPD = mllm.backbone.get_input_embeddings(), [], iter(tokens_IPD)
    visible_IP = iter(visible.view(-1, mllm.num_image_tokens))
    for text, image in zip(texts, has_image, strict=True):
        opening, closing = IMAGE if image else ("", "")
        before, after = (
            embed(torch.tensor(mllm.token_ids(part)))
            for part in (TURN[0] + text + opening, closing + TURN[1])
        )
        seen = torch.ones(0, dtype=torch.bool)
        rows = [before, after]
        if image:
            seen, tokens_PD = next(visible_IP), next(tokens_IPD)
            rows.insert(1, tokens_PD * seen[:, None] if mode == "zero" else tokens_PD)
        keep = torch.cat((torch.ones(len(before)), seen, torch.ones(len(after)))).bool()
        if mode == "zero":
            keep = torch.ones_like(keep)
        position = torch.arange(len(keep))[keep]
        end = len(keep)
        if positions == "compact":
            position, end = torch.arange(len(position)), len(position)
        found.append((torch.cat(rows)[keep], position, end))
    tokens, position, ends = zip(*found, strict=True)
    offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0).int()
    return torch.cat(tokens), torch.cat(position), offsets, torch.tensor(ends)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("mode", ["drop", "zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_condition_is_that_of_whole_turns(mllm, kind, mode, positions, ratio):
    has_image = KINDS[kind]
    tokens_IPD = torch.randn(sum(has_image), mllm.num_image_tokens, mllm.width)
    n_I = torch.arange(sum(has_image))
    visible = visible_mask(MaskConfig(ratio=ratio), 5, n_I, mllm.num_image_tokens)
    got = mllm.condition(
        TEXTS, tokens_IPD, has_image=has_image, visible=visible, mode=mode, positions=positions
    )
    tokens_TD, positions_T, offsets, end_B = whole_turns(
        mllm, TEXTS, tokens_IPD, has_image, visible, mode, positions
    )
    assert torch.equal(got.tokens_TD, tokens_TD) and torch.equal(got.positions_T, positions_T)
    assert torch.equal(got.offsets, offsets) and got.offsets.dtype == torch.int32
    assert torch.equal(got.end_B, end_B) and got.end == int(end_B.max())
    assert list(got.lengths) == offsets.diff().tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, dict(mode="zero"), dict(conditions="all", connector_layers=1), dict(kind="metaquery")],
    ids=str,
)
def test_nothing_is_read_from_the_device(mllm_folder, settings):
    """Tensors on the meta device have no values, so reading one raises.

    Every wait of the host for a GPU is such a read, or a copy of what the host made up meanwhile.
    """
    from iomm.internvl import load_mllm

    mllm = load_mllm(str(mllm_folder), dtype=torch.float32)
    model, n_B, has_image = build(mllm, **settings), torch.arange(4), KINDS["mixed"]
    vae_pixels, vit_pixels = (x.to("meta") for x in pixels(n_B))
    turns = model.turns(n_B, TEXTS, has_image)
    model.to("meta")
    mllm.to("meta")
    inputs = vae_pixels, vit_pixels[:2], n_B, None, TEXTS, has_image, None, turns
    loss, loss_B, t_B = model(*inputs)
    loss.backward()
    sums, counts = loss_by_time(loss_B, t_B)
    assert {x.device.type for x in (loss, loss_B, t_B, sums, counts)} == {"meta"}


def test_turns_move_in_one_copy(mllm):
    turns = build(mllm).turns(torch.arange(3), ["a"] * 3, [True, False, True])
    moved = turns.to(torch.device("meta"))
    storages = {part.untyped_storage()._cdata for part in moved.parts()}
    assert len(storages) == 1 and moved.lengths == turns.lengths
    # n_B, images, offsets, ends, then ids and positions of all tokens, rows and places of images.
    num_visible = len(turns.parts().row_V)
    assert len(turns.buffer) == 3 + 2 + 4 + 3 + 2 * sum(turns.lengths) + 2 * num_visible


def test_turns_of_another_recipe_are_drawn_again(mllm):
    """An evaluation changes the model's recipe while batches are drawn ahead."""
    model, n_B = build(mllm), torch.arange(4)
    inputs = *pixels(n_B), n_B, None, None, None, None
    other = replace(model.recipe, seed=8)
    expected, drawn = model(*inputs), draw_turns(other, mllm, n_B)
    assert drawn.lengths != model.turns(n_B).lengths
    for turns in (drawn, model.turns(n_B)):
        for got, wanted in zip(model(*inputs, turns), expected, strict=True):
            assert torch.equal(got, wanted)
