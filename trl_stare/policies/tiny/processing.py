"""Processor of the small VLA: PIL image resizing, a byte-level tokenizer made in code, and the placeholders."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

_VOCABULARY = """
stack place put pick push pull lift insert move open close grasp release turn hold reach the a an and on in into onto to of at up
down over from with left right top side red green blue yellow white black cube block ball sphere peg hole plate cup spoon carrot
eggplant basket towel cloth table goal target object upright drawer
"""
"""Words that get a token of their own; everything else falls back to bytes, so no instruction is out of vocabulary."""

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<state>")


def build_tokenizer(num_queries: int, num_bins: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a short word list, then one `<query_i>` per environment step of a chunk and one `<action_i>` per bin.

    The ids of `<image>` (4) and `<state>` (5) follow from their places in `SPECIAL_TOKENS`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_VOCABULARY.split(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "state_token": "<state>"},
        padding_side="left",
        model_max_length=512,
    )
    names = [f"<query_{i}>" for i in range(num_queries)] + [f"<action_{i}>" for i in range(num_bins)]
    fast.add_tokens(names, special_tokens=True)
    return fast


class StareVLAImageProcessor(BaseImageProcessor):
    """Resizes to a square with PIL and keeps uint8: the model scales to [-1, 1] on its own device.

    Args:
        image_size (`int`): height and width in pixels.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 64, **kwargs: Any):
        super().__init__(**kwargs)
        self.image_size = image_size

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """A PIL image, an `[H, W, 3]` uint8 array, or a list of them -> `pixel_values` `[N, 3, H, W]` uint8."""
        images = images if isinstance(images, (list, tuple)) else [images]
        size = (self.image_size, self.image_size)
        arrays = []
        for image in images:
            if not isinstance(image, Image.Image):
                image = Image.fromarray(np.asarray(image))
            if image.size != size:
                image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            arrays.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        return BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)


class StareVLAProcessor(ProcessorMixin):
    """Image and instruction -> `input_ids`, `attention_mask`, `pixel_values`.

    Args:
        image_processor ([`StareVLAImageProcessor`]), tokenizer (`PreTrainedTokenizerFast`): the parts.
        num_queries (`int`): `C`, how many query placeholders end the sequence.

    Example: with `C = 2`, "lift" becomes `<s> <image> <state> lift <query_0> <query_1>`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, num_queries: int = 4, **kwargs: Any):
        self.num_queries = num_queries
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Texts are instructions; images one per text."""
        texts = [text] if isinstance(text, str) else list(text or [])
        queries = "".join(f"<query_{i}>" for i in range(self.num_queries))
        prompts = [f"<s><image><state>{text.lower()}{queries}" for text in texts]
        encoded = self.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if images is not None:
            data["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
            if len(data["pixel_values"]) != len(texts):
                raise ValueError(
                    f"`images` must be one per text, got {len(data['pixel_values'])} for {len(texts)} texts."
                )
        return BatchFeature({name: torch.as_tensor(value) for name, value in data.items()}, tensor_type=return_tensors)
