"""The longest caption that the MLLM can read, and cutting longer ones at a token boundary."""

import unicodedata

from iomm.config import AdapterConfig, InputError, PromptConfig
from iomm.mllm import IMAGE, MLLM, TURN

# Tokens of a text may merge with those of the template around it, so a text that fits by its bytes
# alone must leave this many tokens free.
SEAM_TOKENS = 8


class CaptionLimit:
    """Cuts captions to what fits into the MLLM's context next to the chat turn and the queries.

    A cut is a pure function of the caption, so it does not depend on batches, ranks or restarts.

    Attributes:
        max_tokens: tokens of the longest caption.
    """

    def __init__(
        self, mllm: MLLM, adapter: AdapterConfig, prompt: PromptConfig, *, edit: bool = False
    ) -> None:
        """Compute the room that the rest of the context leaves.

        Args:
            mllm: the MLLM, with a tokenizer. Its weights are not used.
            adapter: settings of the queries, which follow the chat turn.
            prompt: the template of captions.
            edit: the texts are instructions, which are followed by an image and have no template.

        Raises:
            InputError: the context has no room for a caption.
        """
        self.tokenizer = mllm.tokenizer
        template = "{caption}" if edit else prompt.caption
        before, _, after = template.partition("{caption}")
        opening, closing = IMAGE if edit else ("", "")
        self.before, self.after = TURN[0] + before, after + opening
        num_queries = 0 if adapter.kind == "none" else adapter.num_queries
        num_image = mllm.num_image_tokens if edit else 0
        tail = len(mllm.token_ids(closing + TURN[1]))
        # Of the text up to the image tokens, as MLLM.condition counts them.
        self.max_turn = mllm.max_positions - num_queries - num_image - tail
        self.max_tokens = self.max_turn - self.num_turn("")
        if self.max_tokens < 1:
            raise InputError(
                f"the MLLM's context of {mllm.max_positions} tokens has no room for a caption "
                f"besides {num_queries} queries and the template {template!r}. Shorten "
                "prompt.caption, or lower adapter.num_queries."
            )

    def num_turn(self, caption: str) -> int:
        """Return the number of tokens of the chat turn up to the image tokens."""
        return len(self._encoded(self.before + caption + self.after)["input_ids"])

    def num_tokens(self, caption: str) -> int:
        """Return how many tokens a caption adds to the chat turn."""
        return self.num_turn(caption) - self.num_turn("")

    def is_short(self, num_bytes: int) -> bool:
        """Return whether a caption of so many UTF-8 bytes fits, whatever its tokens are.

        A token of a byte-level tokenizer has at least one byte.
        """
        return num_bytes <= self.max_tokens - SEAM_TOKENS

    def cut(self, caption: str) -> str:
        """Return the caption, or its longest fitting part that ends where a token ends."""
        # Qwen's tokenizer composes characters first, which can take more bytes.
        text = caption if caption.isascii() else unicodedata.normalize("NFC", caption)
        if self.is_short(len(text.encode("utf-8", "surrogatepass"))):
            return caption
        if self.num_turn(caption) <= self.max_turn:
            return caption
        turn = self.before + caption
        spans = self._encoded(turn, return_offsets_mapping=True)["offset_mapping"]
        for num in range(min(self.max_turn, len(spans) - 1), 0, -1):
            end = spans[num - 1][1]
            # Tokens that share a character have the same span.
            if spans[num][0] < end or end < len(self.before):
                continue
            part = turn[len(self.before) : end]
            if self.num_turn(part) <= self.max_turn:
                return part
        return ""

    def _encoded(self, text: str, **options: bool) -> dict[str, list]:
        # The tokenizer would log that the text exceeds the model's context.
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
