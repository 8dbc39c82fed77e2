"""OpenVLA behind the policy protocol."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trl_stare.interfaces import Observation
from trl_stare.policies.autoregressive import AutoregressivePolicy
from trl_stare.policies.conventions import get_convention
from trl_stare.policies.normalization import ActionStatistics, BinnedActions, select_statistics
from trl_stare.policies.openvla.modeling import EMPTY_TOKEN_ID
from trl_stare.policies.openvla.processing import PROMPT


class OpenVLAPolicy(AutoregressivePolicy, model_type="openvla"):
    """An [`AutoregressivePolicy`] over [`OpenVLAForActionPrediction`]: one step of `A` values per decision.

    Args:
        model ([`OpenVLAForActionPrediction`]): its config holds `norm_stats` and `action_convention`. [`from_pretrained`] takes the
            content of a `dataset_statistics.json` beside it in the place of `norm_stats`, as the published evaluation does: the published
            fine-tuning writes new statistics nowhere else.
        processor ([`OpenVLAProcessor`]): tokenizer and image size.
        unnorm_key (`str`, *optional*): which statistics to use; may be left out where the checkpoint has only one.
        action_convention (`str`, *optional*): overrides the config's, and is saved with it. Published checkpoints name none: use
            `"bridge"` for the Bridge tasks here.

    Raises:
        ValueError: an unknown `unnorm_key` (lists the known ones) or convention, or statistics that make no sense.

    Example:

    ```python
    >>> policy = TokenPolicy.from_pretrained("openvla/openvla-7b", "bridge_orig", dtype=torch.bfloat16)
    >>> policy.act(policy.prepare(obs), temperature=0.0).actions.shape
    torch.Size([1, 1, 7])
    ```
    """

    statistics_file = "dataset_statistics.json"

    def __init__(
        self, model: Any, processor: Any, unnorm_key: str | None = None, action_convention: str | None = None
    ):
        config = model.config
        if action_convention is not None:
            config.action_convention = action_convention
        self.convention = get_convention(config.action_convention)
        unnorm_key = select_statistics(config.norm_stats, unnorm_key)
        statistics = ActionStatistics.of_checkpoint(config.norm_stats, unnorm_key, kind=config.action_statistics)
        super().__init__(
            model,
            processor,
            BinnedActions(statistics, config.n_action_bins),
            chunk_size=1 if config.oft is None else config.oft_settings.chunk_size,
            action_dim=statistics.action_dim,
            unnorm_key=unnorm_key,
            action_token_ids=config.action_token_ids,
        )
        # the model normalises uint8 images itself: a processor with other constants would mean another checkpoint
        images = processor.image_processor
        towers = config.towers()
        if (images.means, images.stds) != ([tower.mean for tower in towers], [tower.std for tower in towers]):
            raise ValueError(
                f"`processor` must normalise images like the model's towers, got means {images.means} and std {images.stds}. "
                "Load both from one checkpoint."
            )
        self._prompt_ids = lru_cache(maxsize=4096)(self._tokenize_one)

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` `[N, S]`, padded on the left, and `pixel_values` `[N, 3, H, W]` uint8."""
        prompts = [self._prompt_ids(instruction) for instruction in obs.instructions]
        ids = torch.full((len(prompts), max(map(len, prompts))), self.model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
        pixels = self.processor.image_processor.resize(list(obs.images.numpy()))
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

    def forward(self, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Any, Tensor]:
        """As above, without keeping the hidden states of all layers."""
        output = self.model(**inputs, **kwargs)
        return output, output.last_hidden_state

    def encode(self, actions: Tensor) -> Tensor:
        """`[N, C, A]` robot units -> `[N, C * A]` bins."""
        return super().encode(actions if self.convention is None else self.convention.from_robot(actions))

    def decode(self, trace: Tensor) -> Tensor:
        """`[N, C * A]` bins -> `[N, C, A]` float32 robot units."""
        actions = super().decode(trace)
        return actions if self.convention is None else self.convention.to_robot(actions)

    def _tokenize_one(self, instruction: str) -> list[int]:
        """`<s> <image> ... In: What action should the robot take to {instruction}?\\nOut: ` in ids; never decoded and read again."""
        tokenizer, config = self.processor.tokenizer, self.model.config
        text = tokenizer(PROMPT.format(instruction=instruction.lower()), add_special_tokens=False)["input_ids"]
        image = [config.image_token_id] * config.num_image_tokens
        ids = [tokenizer.bos_token_id, *image, *text]
        if ids[-1] != EMPTY_TOKEN_ID:
            ids.append(EMPTY_TOKEN_ID)
        longest = config.text_config.max_position_embeddings - self.num_tokens
        if len(ids) > longest:
            raise ValueError(
                f"`instruction` must leave a prompt of at most {longest} tokens, got {len(ids)} for {instruction[:60]!r}. Shorten it."
            )
        return ids
