"""Qwen2.5-VL as the MLLM: its vision encoder and the chat turns of Qwen-Image's pipelines.

The generator reads the decoder's outputs after the final norm, without those of the system text, as
in diffusers' QwenImagePipeline and QwenImageEditPipeline.
"""

from typing import Any

import torch
from torch import Tensor, nn

from iomm.config import InputError
from iomm.kernels.image_patches import normalised
from iomm.mllm import MLLM

# The turn of a text, and of an image and a text. The generator does not read the system text, whose
# 34 or 64 tokens include the header of the user's turn.
SYSTEM = {
    False: "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n",
    True: "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n",
}
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
VISION = ("<|vision_start|>", "<|vision_end|>")
# Longer texts are cut, as in QwenImagePipeline.encode_prompt.
MAX_TEXT_TOKENS = 1024
# CLIP's statistics, with which Qwen2.5-VL was trained.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# Default side of the ViT's square input. It gives 256 image tokens, as many as InternVL3's.
VIT_PX = 448


class QwenVL(MLLM):
    """A frozen Qwen2.5-VL: ViT with window attention, and decoder with 3-axis rotary positions.

    Its projector is the end of the ViT, so `vit_states` already are the image tokens.
    """

    num_text, num_turn, num_skipped = 82, 39, {True: 64, False: 34}

    def __init__(self, qwen: nn.Module, tokenizer: Any, vit_px: int | None = None):
        """Freeze a Qwen2.5-VL.

        Args:
            qwen: the Qwen2_5_VLModel.
            tokenizer: its tokenizer; None for a model without weights.
            vit_px: side of the square to which images are resized for the ViT; VIT_PX by default.

        Raises:
            InputError: unless vit_px is a multiple of the side of an image token, 28 px.
        """
        super().__init__(qwen, tokenizer)
        vision, self.vit_px = qwen.config.vision_config, vit_px or VIT_PX
        token_px = vision.patch_size * vision.spatial_merge_size
        if self.vit_px % token_px or self.vit_px < token_px:
            raise InputError(
                f"model.vit_px must be a positive multiple of {token_px}, got {self.vit_px}"
            )
        # Rotary positions of an image token are its time, row and column, as in get_rope_index.
        self.grid_side = self.vit_px // token_px
        self.num_image_tokens = self.grid_side**2
        self.vit_width = self.width

    @property
    def vit_layers(self) -> nn.Module:
        """The ViT's layers."""
        return self.backbone.visual.blocks

    def turn(self, text: str, image: bool) -> tuple[list[int], list[int], int]:
        """Return the token ids of a turn before and after its image tokens, tokenized.

        The image precedes the text. The third result is the number of tokens of the system text.
        """
        num_system = len(self.token_ids(SYSTEM[image]))
        if image:
            before = self.token_ids(SYSTEM[True] + VISION[0])
            return before, self.token_ids(VISION[1] + text + ASSISTANT), num_system
        ids = self.token_ids(SYSTEM[False] + text + ASSISTANT)
        return ids[: num_system + MAX_TEXT_TOKENS], [], num_system

    def text_frame(self, image: bool) -> tuple[str, str, int]:
        """Return the texts that a turn's text is tokenized together with, before and after it.

        The third result is the number of all other tokens of the turn.
        """
        if not image:
            return SYSTEM[False], ASSISTANT, 0
        rest = len(self.token_ids(SYSTEM[True] + VISION[0])) + self.num_image_tokens
        return VISION[1], ASSISTANT, rest

    @torch.no_grad()
    def vit_states(self, vit_pixels: Tensor) -> Tensor:
        """Return the image tokens (B, P, D), a square in row-major order.

        Args:
            vit_pixels: uint8 (B, vit_px, vit_px, 3), or float (B, 3, vit_px, vit_px) normalised by
                IMAGE_MEAN and IMAGE_STD of this module.
        """
        if vit_pixels.dtype == torch.uint8:
            vit_pixels = normalised(vit_pixels, IMAGE_MEAN, IMAGE_STD)
        vision = self.backbone.config.vision_config
        side = self.vit_px // vision.patch_size
        grid_B3 = torch.tensor([[1, side, side]] * len(vit_pixels), device=vit_pixels.device)
        features = self.backbone.get_image_features(
            patch_rows(
                vit_pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
            ),
            image_grid_thw=grid_B3,
        )
        return torch.stack(features.pooler_output)

    def project(self, states_BNW: Tensor) -> Tensor:
        """Return the image tokens unchanged: the projector is the end of the ViT."""
        return states_BNW

    def vit_flops(self, projector: bool = True) -> int:
        """Return the forward FLOPs of one image through the ViT, which includes its projector.

        Each matrix product counts 2 m n k.
        """
        vision = self.backbone.config.vision_config
        side, inner = self.vit_px // vision.patch_size, vision.hidden_size
        patches, merged = side**2, vision.spatial_merge_size**2 * inner
        # Sides of the windows, in patches. Those at the edge may be smaller.
        window = vision.window_size // vision.patch_size
        sides = [min(window, side - start) for start in range(0, side, window)]
        pairs = sum((rows * columns) ** 2 for rows in sides for columns in sides)
        num_whole = len(set(vision.fullatt_block_indexes) & set(range(vision.depth)))
        linears = 2 * patches * (4 * inner**2 + 3 * inner * vision.intermediate_size)
        total = 2 * patches * self.backbone.visual.patch_embed.proj.weight[0].numel() * inner
        total += vision.depth * linears
        total += 4 * inner * (num_whole * patches**2 + (vision.depth - num_whole) * pairs)
        return total + 2 * self.num_image_tokens * merged * (merged + self.width)


def patch_rows(pixels_BCHW: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Return the ViT's input rows (B x patches, values): (channel, frame, row, column) of a patch.

    The merge x merge patches of an image token are consecutive. A still image fills all frames.
    """
    rows, columns = (side // (patch * merge) for side in pixels_BCHW.shape[2:])
    blocks = pixels_BCHW.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
    # (B, row, column, row in token, column in token, channel, pixel row, pixel column).
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return (
        blocks[..., None, :, :]
        .expand(*[-1] * 6, frames, -1, -1)
        .reshape(-1, pixels_BCHW.shape[1] * frames * patch**2)
    )
