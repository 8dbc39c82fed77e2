"""A small vision-language-action model: FiLM-conditioned convolutions, one dense readout token, a Llama decoder.

Patch tokens alone did not learn to localise within CPU minutes; one token that sees the whole feature map does (measured,
see `docs/`). All action tokens of a chunk are decoded in one pass, from one query placeholder per environment step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.utils import ModelOutput

from trl_stare.policies.action_tokens import imitation_loss
from trl_stare.policies.tiny.configuration import StareVLAConfig


@dataclass
class StareVLAOutput(ModelOutput):
    """
    Attributes:
        loss (`Tensor`, *optional*): scalar imitation loss, with `labels`.
        logits (`Tensor`): `[N, L, num_bins]` over the action vocabulary, lowest bin first.
        features (`Tensor`): `[N, F]`, last hidden state at the first query: what a value head reads.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class FiLMEncoder(nn.Module):
    """Three convolutions, each scaled and shifted by the instruction (FiLM, arXiv 1709.07871), then one token.

    Two coordinate channels (arXiv 1807.03247) and a dense readout keep *where* things are. The early maps take most of a CPU's
    time, so the first convolution has few channels; a first stride of 4 was cheaper still, but localised worse.
    """

    def __init__(self, config: StareVLAConfig):
        super().__init__()
        hidden, channels = config.text_config.hidden_size, [5, *config.conv_channels]
        kernels = [5, *[3] * (len(channels) - 2)]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], kernel, stride=2, padding=kernel // 2)
            for i, kernel in enumerate(kernels)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in channels[1:])
        self.films = nn.ModuleList(nn.Linear(hidden, 2 * c) for c in channels[1:])
        side = config.image_size // 2 ** len(self.convs)
        self.squeeze = nn.Conv2d(channels[-1], config.readout_channels, 1)
        self.readout = nn.Sequential(
            nn.Linear(config.readout_channels * side * side, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )

    def forward(self, pixel_values: Tensor, instruction: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [-1, 1] and `[N, F]` -> `[N, F]`."""
        n, _, height, width = pixel_values.shape
        y = torch.linspace(-1, 1, height, device=pixel_values.device, dtype=pixel_values.dtype)
        x = torch.linspace(-1, 1, width, device=pixel_values.device, dtype=pixel_values.dtype)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(n, 2, height, width)
        features = torch.cat([pixel_values, grid], dim=1)
        for conv, norm, film in zip(self.convs, self.norms, self.films, strict=True):
            scale, shift = film(instruction)[:, :, None, None].chunk(2, dim=1)
            features = F.gelu(norm(conv(features)) * (1 + scale) + shift)
        return self.readout(self.squeeze(features).flatten(1))


class StareVLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """Image, instruction and proprioception -> logits of a chunk of discrete actions, in one forward pass.

    `input_ids` hold the text, one placeholder for the image, one for the state, and `C` query placeholders at the end, as [`StareVLAProcessor`] writes them.

    Example:

    ```python
    >>> inputs = processor(images=[image], text=["stack the red cube"], return_tensors="pt")
    >>> model(**inputs, state=state).logits.shape  # 4 steps of 7 values, 33 bins each
    torch.Size([1, 28, 33])
    ```
    """

    config_class = StareVLAConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _no_split_modules = ["LlamaDecoderLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: StareVLAConfig):
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.vision = FiLMEncoder(config)
        self.state_projector = nn.Sequential(
            nn.Linear(config.state_size, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.decoder = LlamaModel(config.text_config)
        # one query stands for the A values of one environment step: this gives each value its own hidden state
        self.action_projector = nn.Sequential(nn.Linear(hidden, config.action_dim * hidden), nn.GELU())
        self.lm_head = nn.Linear(hidden, config.text_config.vocab_size, bias=False)
        self.register_buffer("action_token_ids", torch.tensor(config.action_token_ids), persistent=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' normal initialisation is meant for deep decoders; the convolutions keep PyTorch's own."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            module.reset_parameters()
        else:
            super()._init_weights(module)
        if isinstance(module, StareVLAForActionPrediction):
            module.action_token_ids.copy_(torch.tensor(self.config.action_token_ids))

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        state: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> StareVLAOutput:
        """
        Args:
            input_ids (`Tensor`): `[N, S]`, the last `C` are the query placeholders.
            pixel_values (`Tensor`): `[N, 3, H, W]`, uint8 0..255, or float already in [-1, 1].
            state (`Tensor`): `[N, P]`, normalised proprioception.
            attention_mask (`Tensor`, *optional*): `[N, S]`.
            labels (`Tensor`, *optional*): `[N, L]` bin indices.
        """
        config, chunk = self.config, self.config.chunk_size
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.to(self.dtype) / 127.5 - 1
        embeddings = self.get_input_embeddings()(input_ids)
        is_text = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        is_text = is_text & (input_ids != config.image_token_id) & (input_ids != config.state_token_id)
        is_text[:, -chunk:] = False
        instruction = (embeddings * is_text[..., None]).sum(1) / is_text.sum(1, keepdim=True).clamp(min=1)
        image = self.vision(pixel_values, instruction)
        state_token = self.state_projector(state.to(self.dtype))
        embeddings = torch.where((input_ids == config.image_token_id)[..., None], image[:, None], embeddings)
        embeddings = torch.where((input_ids == config.state_token_id)[..., None], state_token[:, None], embeddings)
        # what was seen also reaches the queries directly, not through attention alone: half the steps, measured
        seen = (image + state_token)[:, None].expand(-1, chunk, -1)
        embeddings = torch.cat([embeddings[:, :-chunk], embeddings[:, -chunk:] + seen], dim=1)
        hidden = self.decoder(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state[:, -chunk:]
        per_value = self.action_projector(hidden).unflatten(-1, (config.action_dim, -1)).flatten(1, 2)
        logits = F.linear(per_value, self.lm_head.weight[self.action_token_ids])
        loss = None if labels is None else imitation_loss(logits, labels, soft_bins=config.soft_bins)
        return StareVLAOutput(loss=loss, logits=logits, features=hidden[:, 0])
