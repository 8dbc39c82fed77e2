"""Processor of OpenVLA: PIL alone gives the pixels of the published, torchvision-based one bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin

from trl_stare.policies.openvla.configuration import VISION_TOWERS, OpenVLAConfig

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
"""What OpenVLA was trained on (`prismatic/models/backbones/llm/prompting`, `PurePromptBuilder`); instructions in lower case."""


class OpenVLAImageProcessor(BaseImageProcessor):
    """Resizes without regard to the aspect ratio, then normalises once per vision tower.

    Args:
        input_sizes (`list[list[int]]`): `[3, H, W]` per tower. means, stds (`list[list[float]]`): per tower and channel.
        image_resize_strategy (`str`): only `"resize-naive"`, which all published OpenVLA checkpoints use.
        interpolations (`list[str]`): only `"bicubic"`. use_fused_vision_backbone (`bool`): two towers.

    Raises:
        ValueError: another resize strategy, interpolation, or towers of different sizes.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        use_fused_vision_backbone: bool = True,
        image_resize_strategy: str = "resize-naive",
        input_sizes: list[list[int]] | None = None,
        interpolations: list[str] | None = None,
        means: list[list[float]] | None = None,
        stds: list[list[float]] | None = None,
        **kwargs: Any,
    ):
        # the transforms' parameters that the published file repeats follow from the rest
        super().__init__(**{name: value for name, value in kwargs.items() if not name.startswith("tvf_")})
        towers = list(VISION_TOWERS.values())
        self.use_fused_vision_backbone, self.image_resize_strategy = use_fused_vision_backbone, image_resize_strategy
        self.means = means or [tower.mean for tower in towers]
        self.stds = stds or [tower.std for tower in towers]
        self.input_sizes = [list(size) for size in input_sizes or [[3, 224, 224]] * len(self.means)]
        self.interpolations = interpolations or ["bicubic"] * len(self.means)
        if image_resize_strategy != "resize-naive" or set(self.interpolations) != {"bicubic"}:
            raise ValueError(
                "`image_resize_strategy` must be 'resize-naive' with bicubic `interpolations`, got "
                f"{image_resize_strategy!r} and {self.interpolations}."
            )
        if any(size != self.input_sizes[0] for size in self.input_sizes):
            raise ValueError(f"`input_sizes` must be the same for all towers, got {self.input_sizes}.")

    @classmethod
    def of_config(cls, config: OpenVLAConfig) -> OpenVLAImageProcessor:
        """The image processor that fits a model."""
        towers = config.towers()
        return cls(
            use_fused_vision_backbone=config.use_fused_vision_backbone,
            input_sizes=[[3, size, size] for size in config.image_sizes],
            means=[tower.mean for tower in towers],
            stds=[tower.std for tower in towers],
        )

    def resize(self, images: Any) -> Tensor:
        """PIL images or `[H, W, 3]` uint8 arrays -> `[N, 3, H, W]` uint8: what a policy stores, the model normalises.

        Raises:
            ValueError: an array of another shape or dtype.
        """
        height, width = self.input_sizes[0][1:]
        arrays = []
        for image in images if isinstance(images, (list, tuple)) else [images]:
            if not isinstance(image, Image.Image):
                array = np.asarray(image)
                if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
                    raise ValueError(
                        f"`images` must be PIL images or `[H, W, 3]` uint8 arrays, got {array.dtype} {[*array.shape]}."
                    )
                image = Image.fromarray(array)
            image = image.convert("RGB")
            # torchvision's resize of a PIL image is PIL's own, which has always filtered before it shrinks
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            arrays.append(np.asarray(image).transpose(2, 0, 1))
        return torch.from_numpy(np.stack(arrays))

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """One image or a list -> `pixel_values` `[N, 3 * towers, H, W]` float32."""
        pixels = self.resize(images).float().div(255)
        mean, std = (torch.tensor(values)[..., None, None] for values in (self.means, self.stds))
        normalised = torch.cat([(pixels - m) / s for m, s in zip(mean, std, strict=True)], dim=1)
        return BatchFeature({"pixel_values": normalised.numpy()}, tensor_type=return_tensors)


class OpenVLAProcessor(ProcessorMixin):
    """Image and prompt -> `input_ids`, `attention_mask`, `pixel_values`, as the published processor.

    Prompts are padded on the left by default: in a batch all of them end where the action begins.

    Args:
        image_processor ([`OpenVLAImageProcessor`]), tokenizer (`PreTrainedTokenizerBase`): the parts.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer)
        self.tokenizer.padding_side = "left"

    def __call__(
        self, text: str | list[str], images: Any = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Texts are whole prompts; images one per text. `kwargs` go to the tokenizer.

        Raises:
            ValueError: not as many images as texts.
        """
        texts = [text] if isinstance(text, str) else list(text)
        data = dict(self.tokenizer(texts, **({"padding": True} | kwargs)))
        if images is not None:
            data["pixel_values"] = self.image_processor(images)["pixel_values"]
            if len(data["pixel_values"]) != len(texts):
                raise ValueError(
                    f"`images` must be one per text, got {len(data['pixel_values'])} for {len(texts)} texts."
                )
        return BatchFeature(data, tensor_type=return_tensors)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Also writes the image processor to a file of its own, where the published code looks for it."""
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


# Auto classes find a processor by the name that its file gives. Published checkpoints give these, and so does what we save: the
# published code then reads it, and ours is found where remote code would have to be run otherwise.
OpenVLAImageProcessor.__name__ = "PrismaticImageProcessor"
OpenVLAProcessor.__name__ = "PrismaticProcessor"
