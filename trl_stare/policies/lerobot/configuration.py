"""Configuration of a flow policy whose network is LeRobot's."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

NUM_STEPS = {"smolvla": "num_steps", "pi05": "num_inference_steps"}
"""LeRobot's type -> its name for the number of denoising steps. These are the types with an adapter."""

PICTURES = {"smolvla": "resize_imgs_with_padding", "pi05": "image_resolution"}
"""LeRobot's type -> its name for the height and width that its network resizes pictures to."""


class LeRobotFlowConfig(PreTrainedConfig):
    """LeRobot's configuration, and what a [`FlowPolicy`] needs to know besides.

    Args:
        lerobot (`dict`): the content of LeRobot's `config.json`; `type` is `"smolvla"` or `"pi05"`.
        norm_stats (`dict`): `{key: {"action": {...}, "state": {...}}}`. flow (`dict`): fields of `FlowSettings`.
        chunk_size, num_inference_steps, max_action_dim, max_state_dim (`int`, *optional*): LeRobot's by default; no weight depends on
            the first two.
        time_sampling_beta_alpha, time_sampling_beta_beta, time_sampling_scale, time_sampling_offset (`float`): of the times at which
            imitation is trained; the defaults are those of both networks.

    Raises:
        ValueError: a type without an adapter; lists those that have one.
    """

    model_type = "lerobot_flow"

    def __init__(
        self,
        lerobot: dict[str, Any] | None = None,
        norm_stats: dict[str, Any] | None = None,
        flow: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        num_inference_steps: int | None = None,
        max_action_dim: int | None = None,
        max_state_dim: int | None = None,
        time_sampling_beta_alpha: float = 1.5,
        time_sampling_beta_beta: float = 1.0,
        time_sampling_scale: float = 0.999,
        time_sampling_offset: float = 0.001,
        **kwargs: Any,
    ):
        # transformers makes one without arguments to see what differs from the defaults
        self.lerobot = lerobot or {"type": "smolvla"}
        if self.lerobot.get("type") not in NUM_STEPS:
            raise ValueError(
                f"`lerobot['type']` must be one of {sorted(NUM_STEPS)}, got {self.lerobot.get('type')!r}."
            )
        self.norm_stats, self.flow = norm_stats or {}, flow or {}
        self.chunk_size = chunk_size or self.lerobot.get("chunk_size", 50)
        self.num_inference_steps = num_inference_steps or self.lerobot.get(NUM_STEPS[self.lerobot["type"]], 10)
        self.max_action_dim = max_action_dim or self.lerobot.get("max_action_dim", 32)
        self.max_state_dim = max_state_dim or self.lerobot.get("max_state_dim", 32)
        self.time_sampling_beta_alpha, self.time_sampling_beta_beta = time_sampling_beta_alpha, time_sampling_beta_beta
        self.time_sampling_scale, self.time_sampling_offset = time_sampling_scale, time_sampling_offset
        super().__init__(**kwargs)

    @property
    def image_size(self) -> int | None:
        """Pixels of a side of the pictures that the network sees; `None` where it takes them as they are."""
        size = self.lerobot.get(PICTURES[self.lerobot["type"]])
        return max(size) if size else None

    @property
    def lerobot_fields(self) -> dict[str, Any]:
        """LeRobot's configuration with the sizes in use, for a network on the CPU that is not compiled."""
        steps = {NUM_STEPS[self.lerobot["type"]]: self.num_inference_steps}
        sizes = {name: getattr(self, name) for name in ("chunk_size", "max_action_dim", "max_state_dim")}
        return {
            **self.lerobot,
            **sizes,
            **steps,
            "n_action_steps": self.chunk_size,
            "device": "cpu",
            "compile_model": False,
        }
