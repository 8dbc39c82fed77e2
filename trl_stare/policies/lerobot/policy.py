"""SmolVLA and pi0.5 behind the policy protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from trl_stare.interfaces import Observation
from trl_stare.policies.flow.denoiser import inner_model
from trl_stare.policies.flow.policy import FlowPolicy
from trl_stare.policies.lerobot.modeling import LeRobotPrefix
from trl_stare.policies.lerobot.processing import LeRobotFlowProcessor


class LeRobotFlowPolicy(FlowPolicy, model_type="lerobot_flow"):
    """A [`FlowPolicy`] whose network is LeRobot's SmolVLA or pi0.5, not transformers' pi0.

    Made by [`load_lerobot_policy`]; what it saves loads by `from_pretrained`, where LeRobot is installed, and its tensors have
    LeRobot's names. Runs in float32, or under autocast.

    Args:
        model ([`LeRobotFlowModel`]), processor ([`LeRobotFlowProcessor`]), unnorm_key (`str`, *optional*): as of [`FlowPolicy`].
    """

    processor_class = LeRobotFlowProcessor

    @property
    def image_size(self) -> int | None:
        """Pixels of a side of the pictures that the network sees, which it resizes by itself."""
        return self.model.config.image_size

    @property
    def num_features(self) -> int:
        """`F`: the prompt's hidden state and the proprioception, padded."""
        return inner_model(self.model).hidden_size + self.model.config.max_state_dim

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` `[N, S]`, `pixel_values` `[N, cameras, H, W, 3]` uint8, `state` `[N, D]`.

        Raises:
            ValueError: no proprioception, or of another size, where the statistics have it.
        """
        images = obs.images if obs.images.ndim == 5 else obs.images[:, None]
        state = self._state(obs)
        inputs = self.processor(images=images, text=self._prompts(obs.instructions, state))
        return inputs | {"state": F.pad(state, (0, self.model.config.max_state_dim - state.shape[-1]))}

    def _prompts(self, instructions: Sequence[str], state: Tensor) -> list[str]:
        """SmolVLA's ends in a new line; pi0.5's spells out the proprioception, which LeRobot's own step writes."""
        if self.model.config.lerobot["type"] == "smolvla":
            return [f"{instruction.strip()}\n" for instruction in instructions]
        from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
        from lerobot.processor import TransitionKey
        from lerobot.utils.constants import OBS_STATE

        write = Pi05PrepareStateTokenizerProcessorStep(self.model.config.max_state_dim)
        told = {
            TransitionKey.OBSERVATION: {OBS_STATE: state},
            TransitionKey.COMPLEMENTARY_DATA: {"task": list(instructions)},
        }
        return write(told)[TransitionKey.COMPLEMENTARY_DATA]["task"]

    def _read(self, inputs: dict[str, Tensor]) -> LeRobotPrefix:
        return inner_model(self.model).read_prefix(inputs)

    def _velocity(self, inputs: dict[str, Tensor], prefix: LeRobotPrefix, x: Tensor, time: Tensor) -> Tensor:
        return inner_model(self.model).velocity(prefix, x, time)
