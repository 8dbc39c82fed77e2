"""LeRobot's network as a transformers model: what is seen is read once, and the velocity is asked for as often as needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trl_stare.policies.lerobot.configuration import LeRobotFlowConfig

_INSTALL = (
    "Its pins (LeRobot 0.6.1: Python >= 3.12, torch < 2.12, transformers < 5.6, datasets < 5, torchvision) exclude the ones of this "
    "package's requirements.lock. It has an environment of its own: `make test-lerobot`, or `python3.12 -m venv lerobot-env && "
    "lerobot-env/bin/pip install 'lerobot[smolvla,pi,dataset]==0.6.1' 'trl==1.16.0' mani_skill peft`, then `pip install --no-deps -e .` "
    "of this package. See docs/flow.md."
)


class LeRobotPrefix(NamedTuple):
    """What the vision-language part made of `N` observations.

    Attributes:
        cache (`Cache`): keys and values that the action expert attends to. mask (`Tensor`): `[N, S]` bool, where they count.
        features (`Tensor`): `[N, F]`, the mean hidden state of the prompt, and the proprioception.
    """

    cache: Any
    mask: Tensor
    features: Tensor


def make_lerobot_policy(fields: dict[str, Any]) -> Any:
    """LeRobot's `PreTrainedPolicy` of random weights.

    Args:
        fields (`dict`): of its `config.json`.

    Raises:
        ImportError: LeRobot is not installed; says how it can be.
    """
    try:
        import draccus
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class
    except ImportError as error:
        raise ImportError(f"{fields['type']!r} needs LeRobot, which is not installed. {_INSTALL}") from error
    known = {name: value for name, value in fields.items() if name != "type"}
    config = draccus.decode(PreTrainedConfig.get_choice_class(fields["type"]), known)
    return get_policy_class(fields["type"])(config)


class LeRobotFlowModel(PreTrainedModel):
    """LeRobot's SmolVLA or pi0.5, with the tensor names of its checkpoints; loading and saving are transformers'.

    Args:
        config ([`LeRobotFlowConfig`]): of what.
    """

    config_class = LeRobotFlowConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LeRobotFlowConfig):
        super().__init__(config)
        # transformers makes models without memory before it loads them; LeRobot's keep tensors that no checkpoint holds
        with torch.device("cpu"):
            policy = make_lerobot_policy(config.lerobot_fields)
        self.model = policy.model
        # not a submodule: it is asked for how it prepares images, and its only weights are those of `model`
        self.__dict__["lerobot_policy"] = policy
        saved = self.state_dict().keys()
        self.__dict__["constants"] = {name: x.clone() for name, x in self.named_buffers() if name not in saved}
        self.post_init()

    def initialize_weights(self) -> None:
        """Called when the model is made or loaded: LeRobot's initial weights stay as they are.

        transformers leaves memory of any content in the place of what no checkpoint holds (positions, frequencies).
        """
        for name, value in self.constants.items():
            self.get_buffer(name).copy_(value)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Under LeRobot's names: transformers would write the PaliGemma in pi0.5 under those of older checkpoints."""
        super().save_pretrained(save_directory, **{"save_original_format": False} | kwargs)

    @property
    def hidden_size(self) -> int:
        """Of the prompt's hidden states."""
        experts = self._experts
        config = experts.config if self.config.lerobot["type"] == "smolvla" else experts.paligemma.config
        return config.text_config.hidden_size

    def read_prefix(self, inputs: dict[str, Tensor]) -> LeRobotPrefix:
        """One forward of the vision-language part; the steps are those of LeRobot's `sample_actions`.

        Args:
            inputs (`dict`): `pixel_values` `[N, cameras, H, W, 3]` uint8, `input_ids`, `attention_mask` `[N, S]`, `state` `[N, P]`.
        """
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        images, seen = self._images(inputs["pixel_values"])
        is_smolvla = self.config.lerobot["type"] == "smolvla"
        state = {"state": inputs["state"]} if is_smolvla else {}  # pi0.5 has read it as text
        text = inputs["input_ids"], inputs["attention_mask"].bool()
        embeds, mask, blocks = self.model.embed_prefix(images, seen, *text, **state)
        attention = make_att_2d_masks(mask, blocks)
        if not is_smolvla:
            attention = prepare_attention_masks_4d(attention)
            self._experts.paligemma.model.language_model.config._attn_implementation = "eager"
        (hidden, _), cache = self._experts.forward(
            attention_mask=attention,
            position_ids=mask.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embeds, None],
            use_cache=True,
        )
        mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return LeRobotPrefix(cache, mask, torch.cat([mean, inputs["state"].float()], dim=-1))

    def velocity(self, prefix: LeRobotPrefix, x: Tensor, time: Tensor) -> Tensor:
        """`[N, C, D]` float32, the velocity of `x` `[N, C, D]` at `time` `[N]`, where 1 is noise; differentiable."""
        return self.model.denoise_step(
            prefix_pad_masks=prefix.mask, past_key_values=prefix.cache, x_t=x, timestep=time.float()
        ).float()

    @property
    def _experts(self) -> torch.nn.Module:
        return (
            self.model.vlm_with_expert
            if self.config.lerobot["type"] == "smolvla"
            else self.model.paligemma_with_expert
        )

    def _images(self, pixels: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What LeRobot makes of pictures: resized, one tensor a camera of its config, and which of them are there.

        Raises:
            ValueError: more cameras than the checkpoint has.
        """
        policy = self.lerobot_policy
        names = list(policy.config.image_features)
        if pixels.shape[1] > len(names):
            raise ValueError(f"`images` must be of at most {len(names)} cameras, {names}, got {pixels.shape[1]}.")
        pictures = pixels.permute(1, 0, 4, 2, 3).float() / 255
        prepare = policy.prepare_images if self.config.lerobot["type"] == "smolvla" else policy._preprocess_images
        return prepare(dict(zip(names, pictures, strict=False)))
