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
        self.num_cameras = self.settings.num_images
        if self.settings.state_size:
            self._first, self._second, self._scaled = self._state_statistics(model.config)

    @property
    def state_size(self) -> int | None:
        """Values of proprioception that the model reads; `None` for none."""
        return self.settings.state_size or None

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
            inputs["state"] = torch.where(self._scaled, self._normalize(obs.state), obs.state)
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

    def _normalize(self, state: Tensor) -> Tensor:
        """`[N, P]` as the model was trained to read it: only what has a range is clipped.

        Sources: `normalize_proprio` of openvla-oft `experiments/robot/openvla_utils.py`, and, since that knows no `"normal"`,
        `normalize_action_and_proprio` of its `prismatic/vla/datasets/rlds/utils/data_utils.py`.
        """
        if self.bins.statistics.kind == "normal":
            return (state - self._first) / (self._second + 1e-8)
        return (2 * (state - self._first) / (self._second - self._first + 1e-8) - 1).clamp(-1, 1)

    def _state_statistics(self, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The two statistics `[P]` of the kind that scales the actions, and where they apply."""
        names = KINDS[self.bins.statistics.kind]
        stats = config.norm_stats[self.unnorm_key].get("proprio", {})
        first, second = (stats.get(name, ()) for name in names)
        mask = stats.get("mask", [True] * len(first))
        found = [torch.tensor(values) for values in (first, second, mask)]
        if any(
            len(values) != self.settings.state_size or not torch.isfinite(values.float()).all() for values in found
        ):
            raise ValueError(
                f"`norm_stats[{self.unnorm_key!r}]['proprio']` must hold {self.settings.state_size} finite values of {names[0]!r} and "
                f"{names[1]!r}, got {stats}. Take them from the checkpoint's `dataset_statistics.json`."
            )
        return found[0], found[1], found[2].bool()
