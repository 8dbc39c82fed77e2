"""OpenVLA (arXiv 2406.09246) as a native transformers model: the parameter names of the published checkpoints, neither timm nor torchvision.

The patches of the image stand in `input_ids` as placeholders right after the first token, so that ids, mask and logits have one
length, and padding on the left, `generate`, KV caching and `logits_to_keep` work as for any language model. The published code
inserts the patches inside `forward` instead; inputs without placeholders are expanded the same way here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from trl_stare.policies.normalization import ActionStatistics, BinnedActions
from trl_stare.policies.openvla.configuration import OpenVLAConfig
from trl_stare.policies.openvla.vision import AttentionPool, LayerScale, VisionBackbone, VisionTransformer

EMPTY_TOKEN_ID = 29871
"""Llama's token for a lone space: what stands before the first action token in OpenVLA's training data."""


@dataclass
class OpenVLAOutput(ModelOutput):
    """
    Attributes:
        loss (`Tensor`, *optional*): scalar next-token cross-entropy, with `labels`.
        logits (`Tensor`): `[N, S, vocabulary]`, the last `logits_to_keep` positions.
        last_hidden_state (`Tensor`): `[N, S, F]`, all positions, after the final norm.
        past_key_values (`Cache`, *optional*). hidden_states, attentions (`tuple`, *optional*): the decoder's.
        image_hidden_states (`Tensor`, *optional*): `[N, image tokens, F]`, projected.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    image_hidden_states: Tensor | None = None


class OpenVLAProjector(nn.Module):
    """Vision features -> the decoder's embeddings; one layer more where two towers are fused."""

    def __init__(self, fused: bool, vision_width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width if fused else hidden)
        self.fc2 = nn.Linear(4 * vision_width if fused else hidden, hidden)
        self.fc3 = nn.Linear(hidden, hidden) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        """`[N, patches, F]` -> `[N, patches, F]`."""
        hidden = self.fc2(F.gelu(self.fc1(features)))
        return hidden if self.fc3 is None else self.fc3(F.gelu(hidden))


class ProprioProjector(nn.Module):
    """Proprioception -> one token (openvla-oft `prismatic/models/projectors.py`, where it is a file of its own)."""

    def __init__(self, state_size: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(state_size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, state: Tensor) -> Tensor:
        """`[N, P]` -> `[N, 1, F]`."""
        return self.fc2(F.gelu(self.fc1(state)))[:, None]


class OpenVLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """Image and instruction -> action tokens, one after the other.

    Example:

    ```python
    >>> inputs = processor(images=image, text="In: What action should the robot take to lift the cube?\\nOut:")
    >>> model.predict_action(**inputs, unnorm_key="bridge_orig")  # 7 values
    ```
    """

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTBlock", "LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = VisionBackbone(config)
        self.projector = OpenVLAProjector(
            config.use_fused_vision_backbone, self.vision_backbone.width, config.text_config.hidden_size
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.oft = config.oft_settings
        if self.oft is not None and self.oft.state_size:
            self.proprio_projector = ProprioProjector(self.oft.state_size, config.text_config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerScale):
            init.constant_(module.scale_factor, 1e-5)  # DINOv2's own
        elif isinstance(module, VisionTransformer):
            for token in (module.cls_token, module.reg_token, module.pos_embed):
                if token is not None:
                    init.normal_(token, std=0.02)
        elif isinstance(module, AttentionPool):
            init.normal_(module.latent, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head, which `target_modules="all-linear"` of PEFT leaves alone."""
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The decoder without its head."""
        return self.language_model.get_decoder()

    @property
    def num_image_tokens(self) -> int:
        """Placeholders in `input_ids` of what is seen: all images, and proprioception."""
        return self.config.num_image_tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[N, images * C, H, W]` -> `[N, images * patches, F]`, the decoder's embeddings of the images.

        Raises:
            ValueError: channels that are not those of so many images.
        """
        n, channels = pixel_values.shape[:2]
        images = 1 if self.oft is None else self.oft.num_images
        if channels % images:
            raise ValueError(f"`pixel_values` must hold {images} images in its channels, got {channels} channels.")
        features = self.vision_backbone(pixel_values.unflatten(1, (images, -1)).flatten(0, 1))
        return self.projector(features).view(n, -1, self.config.text_config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        state: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> OpenVLAOutput:
        """
        Args:
            input_ids (`Tensor`): `[N, S]`, with one placeholder per patch, or, with `pixel_values`, without any.
            attention_mask (`Tensor`, *optional*): `[N, S]`, or with the length of cache and `S` together.
            pixel_values (`Tensor`, *optional*): `[N, 3, H, W]` uint8 or normalised float; left out in cached steps. Of several images
                (`config.oft`) the channels stand behind each other.
            state (`Tensor`, *optional*): `[N, P]`, normalised, where `config.oft` has a `state_size`.
            labels (`Tensor`, *optional*): `[N, S]`, -100 where there is nothing to predict.
            logits_to_keep (`int`): compute logits of so many last positions; 0 means all.

        Raises:
            ValueError: the placeholders are not as many as the image has patches, or `state` is missing.
        """
        image = None
        if inputs_embeds is None:
            if pixel_values is not None and not (input_ids == self.config.image_token_id).any():
                input_ids, attention_mask, labels = self.expand_image_tokens(input_ids, attention_mask, labels)
            inputs_embeds, image = self._embed(input_ids, pixel_values, state)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if self.oft is not None and self.oft.bidirectional:
            attention_mask = self._bidirectional_mask(attention_mask, inputs_embeds)
        output = self.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **{name: value for name, value in kwargs.items() if name not in ("return_dict", "num_items_in_batch")},
        )
        hidden = output.last_hidden_state
        logits = self.get_output_embeddings()(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.language_model.loss_function(
                logits, labels, vocabulary, num_items_in_batch=kwargs.get("num_items_in_batch")
            )
        return OpenVLAOutput(
            loss=loss,
            logits=logits,
            last_hidden_state=hidden,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=image,
        )

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens `[N, S]` as `[N, S, F]`, placeholders replaced by the image, and the image's own part of them."""
        inputs_embeds, image = self.get_input_embeddings()(input_ids), None
        if pixel_values is not None:
            image = self._see(pixel_values, state).to(inputs_embeds.dtype)
            inputs_embeds = self._insert_image(input_ids, inputs_embeds, image)
        if self.oft is not None:
            inputs_embeds = inputs_embeds.masked_fill((input_ids == self.config.action_slot_id)[..., None], 0)
        return inputs_embeds, image

    def _see(self, pixel_values: Tensor, state: Tensor | None) -> Tensor:
        """`[N, image tokens, F]`: images, then proprioception."""
        image = self.get_image_features(pixel_values)
        size = 0 if self.oft is None else self.oft.state_size
        if (state is None and size) or (state is not None and state.shape != (len(image), size)):
            raise ValueError(
                f"`state` must be `[{len(image)}, {size}]`, or `None` for size 0, got {None if state is None else [*state.shape]}."
            )
        return image if state is None else torch.cat([image, self.proprio_projector(state.to(image.dtype))], dim=1)

    def _bidirectional_mask(self, attention_mask: Tensor | None, embeddings: Tensor) -> Tensor:
        """`[N, S]` -> `[N, 1, S, S]`: every position sees every attended one, later ones too.

        The published code needs a fork of transformers for this. With a mask of four dimensions the stock decoder makes none.
        """
        kind = self.language_model.config._attn_implementation
        if kind not in ("sdpa", "eager"):
            raise ValueError(
                f"`attn_implementation` must be 'sdpa' or 'eager' for a bidirectional model, got {kind!r}."
            )
        if attention_mask is None:
            attention_mask = embeddings.new_ones(embeddings.shape[:2])
        mask = attention_mask.bool()[:, None, None].expand(-1, 1, embeddings.shape[1], -1)
        if kind == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=embeddings.dtype).masked_fill(~mask, torch.finfo(embeddings.dtype).min)

    def _insert_image(self, input_ids: Tensor, embeddings: Tensor, image: Tensor) -> Tensor:
        placeholders = input_ids == self.config.image_token_id
        # `masked_scatter` alone would drop surplus patches in silence
        if (placeholders.sum(1) != image.shape[1]).any():
            raise ValueError(
                f"`input_ids` must hold {image.shape[1]} image placeholders (id {self.config.image_token_id}) in every row, got "
                f"{placeholders.sum(1).tolist()}. A truncated prompt loses them: shorten the instruction."
            )
        return embeddings.masked_scatter(placeholders[..., None], image)

    def expand_image_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Put the placeholders of one image after the first attended token of each row.

        Args:
            input_ids, attention_mask, labels (`Tensor`): `[N, S]`.

        Returns:
            The same, `[N, S + patches]`; the mask is 1 and the labels are -100 at the placeholders.

        Example: with 2 patches `<pad> <s> lift` becomes `<pad> <s> <image> <image> lift`.
        """
        n, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = torch.arange(length, device=input_ids.device)
        target = columns + (columns > mask.long().argmax(1, keepdim=True)) * self.num_image_tokens

        def spread(values: Tensor | None, fill: int) -> Tensor | None:
            if values is None:
                return None
            return values.new_full((n, length + self.num_image_tokens), fill).scatter(1, target, values)

        return spread(input_ids, self.config.image_token_id), spread(attention_mask, 1), spread(labels, -100)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`; prompts without placeholders get them first, so the sequences it returns hold them.

        To sample like a policy pass `top_k=0`: transformers' default keeps only the 50 likeliest tokens.
        """
        if pixel_values is not None and not (input_ids == self.config.image_token_id).any():
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            input_ids, attention_mask, _ = self.expand_image_tokens(input_ids, attention_mask)
        return super().generate(input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)

    # `generate` checks its arguments against this signature: the last name must be `kwargs`
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The image goes in once, at the first step, and is in the cache from then on.

        The published code asks whether there *is* a cache instead; transformers >= 4.50 passes an empty one at the first step,
        so that image and prompt were dropped in silence.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    @torch.no_grad()
    def predict_action(
        self, input_ids: Tensor, unnorm_key: str | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> np.ndarray:
        """The published interface: one prompt `[1, S]` -> one action `[A]`, un-normalised, `generate`'s options in `kwargs`.

        Raises:
            ValueError: `unnorm_key` is unknown (the known ones are listed), or the model decides on chunks.
        """
        if self.oft is not None:
            raise ValueError(
                "`predict_action` writes one token after the other, got a model with `oft`. Use its policy's `act`."
            )
        actions = BinnedActions(
            ActionStatistics.of_checkpoint(self.config.norm_stats, unnorm_key, kind=self.config.action_statistics),
            self.config.n_action_bins,
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if (input_ids[:, -1] != EMPTY_TOKEN_ID).any():
            input_ids = F.pad(input_ids, (0, 1), value=EMPTY_TOKEN_ID)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        sequence = self.generate(input_ids, attention_mask, max_new_tokens=actions.action_dim, **kwargs)
        highest = self.config.action_token_ids[0]
        bins = (highest - sequence[0, -actions.action_dim :]).clamp(0, self.config.n_action_bins - 1)
        return actions.decode(bins.cpu()).numpy()
