"""What SmolVLA and pi0.5 are given: pictures as they are, which the network resizes itself, and the prompt in ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from trl_stare.policies.flow.processing import check_images


class LeRobotFlowProcessor(ProcessorMixin):
    """Images and prompts -> `input_ids`, `attention_mask`, `pixel_values`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): SmolVLM2's for SmolVLA, PaliGemma's for pi0.5.
        max_text_tokens (`int`): longest prompt; LeRobot cuts a longer one off, here it is refused.
    """

    def __init__(self, tokenizer: Any = None, max_text_tokens: int = 48, **kwargs: Any):
        self.max_text_tokens = max_text_tokens
        super().__init__(tokenizer)

    def __call__(self, images: Tensor, text: Sequence[str], **kwargs: Any) -> dict[str, Tensor]:
        """`images` `[N, cameras, H, W, 3]` uint8 and `N` prompts, which are padded on the right; images stay as they are.

        Raises:
            ValueError: images of another shape or dtype, or a prompt that is too long.
        """
        check_images(images, len(text))
        tokens = self.tokenizer(list(text), padding=True, padding_side="right", return_tensors="pt")
        longest = tokens["attention_mask"].sum(1).max().item()
        if longest > self.max_text_tokens:
            raise ValueError(
                f"`instruction` must make a prompt of at most {self.max_text_tokens} tokens, got {longest} of {len(text)} prompts "
                f"beginning with {text[0][:60]!r}. Shorten it."
            )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")} | {"pixel_values": images}
