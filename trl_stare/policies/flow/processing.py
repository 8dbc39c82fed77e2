"""What pi0 sees: pictures resized with their proportions kept, and `<image> ... <bos> instruction <newline>` in ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import ProcessorMixin


class FlowProcessor(ProcessorMixin):
    """Images and instructions -> `input_ids`, `attention_mask`, `pixel_values`, `pixel_attention_mask`.

    transformers' own `PI0Processor` needs torchvision; this one does not. The prompt is the same.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a beginning-of-sequence token; PaliGemma's for published checkpoints.
        image_size (`int`): pixels of a side. tokens_per_image (`int`): patches. image_token_id (`int`): their placeholder.
        max_text_tokens (`int`): longest instruction; 48 in LeRobot and openpi.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 224,
        tokens_per_image: int = 256,
        image_token_id: int = 257152,
        max_text_tokens: int = 48,
        **kwargs: Any,
    ):
        self.image_size, self.tokens_per_image, self.image_token_id = image_size, tokens_per_image, image_token_id
        self.max_text_tokens = max_text_tokens
        super().__init__(tokenizer)

    def __call__(self, images: Tensor, text: Sequence[str], **kwargs: Any) -> dict[str, Tensor]:
        """`images` `[N, cameras, H, W, 3]` uint8 and `N` instructions; prompts are padded on the right, images stay uint8.

        Raises:
            ValueError: images of another shape or dtype, or an instruction that is too long.
        """
        check_images(images, len(text))
        prompts = [self._prompt_ids(instruction, images.shape[1]) for instruction in text]
        ids = torch.full((len(prompts), max(map(len, prompts))), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
        pixels = torch.stack([torch.stack([self._resize(image) for image in cameras]) for cameras in images])
        seen = torch.ones(images.shape[:2], dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_attention_mask": seen}

    def _prompt_ids(self, instruction: str, cameras: int) -> list[int]:
        text = self.tokenizer(f"{instruction.strip()}\n", add_special_tokens=False)["input_ids"]
        if len(text) >= self.max_text_tokens:
            raise ValueError(
                f"`instruction` must have fewer than {self.max_text_tokens} tokens, got {len(text)} for {instruction[:60]!r}. "
                "Shorten it."
            )
        return [self.image_token_id] * (self.tokens_per_image * cameras) + [self.tokenizer.bos_token_id, *text]

    def _resize(self, image: Tensor) -> Tensor:
        """`[H, W, 3]` -> `[3, S, S]` uint8, black beside the picture (`resize_with_pad` of openpi's `image_tools.py`)."""
        size = (self.image_size, self.image_size)
        if tuple(image.shape[:2]) != size:
            padded = ImageOps.pad(Image.fromarray(image.numpy()), size, method=Image.Resampling.BILINEAR)
            image = torch.from_numpy(np.array(padded))
        return image.permute(2, 0, 1)


def check_images(images: Tensor, n: int) -> None:
    """Raise unless `images` are `[n, cameras, H, W, 3]` uint8.

    Raises:
        ValueError: images of another shape or dtype.
    """
    if images.ndim != 5 or images.shape[-1] != 3 or images.dtype != torch.uint8 or len(images) != n:
        raise ValueError(f"`images` must be `[{n}, cameras, H, W, 3]` uint8, got {images.dtype} {[*images.shape]}.")
