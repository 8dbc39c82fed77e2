"""OpenVLA-OFT (arXiv 2502.19645) behind the policy protocol: a chunk of actions in one forward pass, with the discrete head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_stare.interfaces import ActionSample, Observation
from trl_stare.policies.normalization import KINDS
from trl_stare.policies.openvla.policy import OpenVLAPolicy
from trl_stare.policies.token_policy import sample_bins


class OpenVLAOFTPolicy(OpenVLAPolicy, model_type="openvla_oft"):
    """An [`OpenVLAPolicy`] that reads `C * A` empty slots behind the prompt and predicts all of their tokens at once.

    The token of a slot is predicted at the position before it, as a language model does. Since the slots are empty, the tokens of
    a chunk do not depend on each other: sampling and scoring are one and the same forward pass.

    What the checkpoint was trained with has to be said when it is loaded, and is saved with it, see
    [`~trl_stare.policies.openvla.OFTSettings`]. The published L1 and diffusion heads, and FiLM, are not here: they have no tokens.

    Args:
        model ([`OpenVLAForActionPrediction`]): with `config.oft`.
        processor, unnorm_key, action_convention: see [`OpenVLAPolicy`].

    Raises:
        ValueError: statistics of proprioception that are missing or of another size, where the model reads it.

    Example:

    ```python
    >>> policy = TokenPolicy.from_pretrained("outputs/my_oft", oft={"chunk_size": 8, "bidirectional": False})
    >>> policy.act(policy.prepare(obs), temperature=1.0).actions.shape
    torch.Size([1, 8, 7])
    ```
    """

    def __init__(
        self, model: Any, processor: Any, unnorm_key: str | None = None, action_convention: str | None = None
    ):
        super().__init__(model, processor, unnorm_key, action_convention)
        self.settings = model.config.oft_settings
        if self.settings.state_size:
            self._low, self._high, self._scaled = self._state_range(model.config)

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """As [`OpenVLAPolicy`], of several cameras `obs.images` `[N, cameras, H, W, 3]`; `state` `[N, P]` normalised.

        Raises:
            ValueError: images of another number of cameras, or no proprioception where the model reads it.
        """
        n, cameras, size = len(obs.instructions), self.settings.num_images, self.settings.state_size
        images = obs.images if obs.images.ndim == 5 else obs.images[:, None]
        if images.shape[1] != cameras:
            raise ValueError(
                f"`obs.images` must be those of {cameras} cameras, got {[*obs.images.shape]}. Give `[N, {cameras}, H, W, 3]`."
            )
        inputs = super().prepare(obs._replace(images=images.flatten(0, 1)))
        inputs["pixel_values"] = inputs["pixel_values"].reshape(n, -1, *inputs["pixel_values"].shape[-2:])
        if size:
            if obs.state is None or obs.state.shape[-1] != size:
                got = None if obs.state is None else [*obs.state.shape]
                raise ValueError(
                    f"`obs.state` must be `[N, {size}]`, got {got}. This checkpoint reads proprioception."
                )
            # `normalize_proprio` of openvla-oft `experiments/robot/openvla_utils.py`
            state = (2 * (obs.state - self._low) / (self._high - self._low + 1e-8) - 1).clamp(-1, 1)
            inputs["state"] = torch.where(self._scaled, state, obs.state)
        return inputs

    def action_logits(self, inputs: dict[str, Tensor], trace: Tensor | None) -> tuple[Tensor, Tensor]:
        """One forward pass; features are the hidden state at the prompt's last token. `trace` is not read."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        slots = inputs["input_ids"].new_full(
            (len(inputs["input_ids"]), self.num_tokens), self.model.config.action_slot_id
        )
        if self.settings.stop_token:
            slots = F.pad(slots, (0, 1), value=self.processor.tokenizer.eos_token_id)
        kept = slots.shape[1] + 1
        output, hidden = self.forward(self.extend(inputs, slots), use_cache=False, logits_to_keep=kept)
        logits = output.logits[:, : self.num_tokens, self.action_token_ids.to(self.device)]
        return logits, hidden[:, -kept]

    def _decide(
        self, inputs: dict[str, Tensor], temperature: float, generator: torch.Generator | None
    ) -> ActionSample:
        logits, features = self.action_logits(inputs, None)
        trace, logps = sample_bins(logits, temperature, generator)
        return ActionSample(self.decode(trace), trace, logps, features.float().cpu())

    def _state_range(self, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Lowest and highest value `[P]`, and where they apply."""
        low, high = KINDS[config.action_statistics or "quantiles"]
        stats = config.norm_stats[self.unnorm_key].get("proprio", {})
        mask = stats.get("mask", [True] * len(stats.get(low, ())))
        found = [torch.tensor(values) for values in (stats.get(low, ()), stats.get(high, ()), mask)]
        if any(
            len(values) != self.settings.state_size or not torch.isfinite(values.float()).all() for values in found
        ):
            raise ValueError(
                f"`norm_stats[{self.unnorm_key!r}]['proprio']` must hold {self.settings.state_size} finite values of {low!r} and "
                f"{high!r}, got {stats}. Take them from the checkpoint's `dataset_statistics.json`."
            )
        return found[0], found[1], found[2].bool()
