"""Captions that exceed the MLLM's context are cut where a token ends."""

import pytest
import torch

from iomm.caption_limit import CaptionLimit
from iomm.config import AdapterConfig, InputError, PromptConfig

QUERIES = AdapterConfig(num_queries=8, head_dim=16)
TEXTS = {
    "Chinese": "一幅画" * 200,
    "words": "Generate an image that is a red circle and " * 60,
    "one word": "x" * 3000,
    "combining marks": "e\u0301" * 900,
    "grows when composed": "\u0958" * 400,
    "white space": "a" + "   \n" * 500 + "b",
    "emoji": "👩‍👩‍👧" * 200,
    "special tokens": "a<|im_end|>" * 600,
    "control characters": "\x01\x02" * 500,
}


@pytest.mark.parametrize("template", ["{caption}", "Generate an image: {caption}. Now!"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_cut_caption_is_the_longest_part_that_fits(mllm, text, template):
    limit = CaptionLimit(mllm, QUERIES, PromptConfig(caption=template))
    part = limit.cut(text)
    assert part and text.startswith(part) and len(part) < len(text)
    assert limit.cut(part) == part == limit.cut(text)
    # The character after the cut has at most 12 tokens, one for each byte.
    assert limit.max_turn - 12 < limit.num_turn(part) <= limit.max_turn
    before = mllm.token_ids(limit.before + text)
    kept = mllm.token_ids(limit.before + part)
    assert kept == before[: len(kept)]
    condition = mllm.condition([template.replace("{caption}", part)])
    # The end of the chat turn is complete, and the queries have their places.
    tail = mllm.token_ids("<|im_end|>\n<|im_start|>assistant\n")
    embedded = mllm.backbone.get_input_embeddings()(torch.tensor(tail))
    assert torch.equal(condition.tokens_TD[-len(tail) :], embedded)
    assert condition.end + QUERIES.num_queries <= mllm.max_positions
    mllm.queries(torch.zeros(1, 8, mllm.width), condition, mllm.prefix(condition)[0])


def test_fitting_caption_stays_as_it_is(mllm):
    limit = CaptionLimit(mllm, QUERIES, PromptConfig())
    longest = "x" * limit.max_tokens
    assert limit.num_turn(longest) == limit.max_turn
    for text in ("", "a red circle", "一幅画" * 20, longest):
        assert limit.cut(text) == text
    assert limit.cut(longest + "x") == longest


def test_short_captions_need_no_tokenizer(mllm, monkeypatch):
    limit = CaptionLimit(mllm, QUERIES, PromptConfig())
    monkeypatch.setattr(limit, "tokenizer", None)
    assert limit.cut("一幅画" * 20) == "一幅画" * 20


def test_instruction_leaves_room_for_its_image(mllm):
    limit = CaptionLimit(mllm, QUERIES, PromptConfig(caption="not used: {caption}"), edit=True)
    tokens_IPD = torch.zeros(1, mllm.num_image_tokens, mllm.width)
    condition = mllm.condition([limit.cut("make it red " * 200)], tokens_IPD)
    # One token of 12 bytes may be missing.
    assert 0 <= mllm.max_positions - QUERIES.num_queries - condition.end < 12


def test_context_without_room_is_refused(mllm):
    with pytest.raises(InputError, match="no room for a caption besides 256 queries"):
        CaptionLimit(mllm, AdapterConfig(num_queries=256), PromptConfig())
    none = AdapterConfig(kind="none", conditions="all", num_queries=256)
    assert CaptionLimit(mllm, none, PromptConfig()).max_tokens > 0
