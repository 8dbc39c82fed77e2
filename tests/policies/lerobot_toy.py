"""LeRobot's SmolVLA and pi0.5 of random weights, small enough for a CPU. Only importable where LeRobot is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pi05 import modeling_pi05
from transformers import (
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from trl_stare.policies.tiny.processing import build_tokenizer

IMAGE_SIZE, STATE_SIZE = 56, 9
FEATURES = {
    "input_features": {
        "observation.images.top": {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]},
        "observation.state": {"type": "STATE", "shape": [STATE_SIZE]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    "device": "cpu",
}
SIZES = {"chunk_size": 4, "n_action_steps": 4, "max_action_dim": 8, "max_state_dim": 16}
STATISTICS = {
    "toy": {
        "action": {"mean": [0.1] * 7, "std": [0.5] * 7},
        "state": {"mean": [0.0] * STATE_SIZE, "std": [1.0] * STATE_SIZE},
    }
}


def make_tokenizer() -> Any:
    """With the special tokens that SmolVLM2's has."""
    names = {
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = build_tokenizer(0, 0)
    tokenizer.add_special_tokens({"additional_special_tokens": [*names.values()]})
    tokenizer._set_model_specific_special_tokens(names)
    return tokenizer


def write_smolvlm(folder: Path) -> None:
    """A SmolVLM's configuration and processor, which SmolVLA asks for by name."""
    tokenizer = make_tokenizer()
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 14}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=image_token, scale_factor=2, pad_token_id=0
    ).save_pretrained(folder)
    SmolVLMProcessor(
        SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=4, chat_template="{{ messages }}"
    ).save_pretrained(folder)


@contextmanager
def small_pi05() -> Iterator[None]:
    """LeRobot's pi0.5 has its sizes in the code: smaller ones within the block."""
    paligemma = modeling_pi05.PaliGemmaForConditionalGenerationWithPiGemma

    def shrink(config: Any) -> Any:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"patch_size": 14, "projection_dim": config.text_config.hidden_size}
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        config.text_config.vocab_size = len(build_tokenizer(0, 0))
        return paligemma(config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_pi05, "PaliGemmaForConditionalGenerationWithPiGemma", shrink)
        widths = {"gemma_2b": 64, "gemma_300m": 32}
        # LeRobot counts on eight heads
        patch.setattr(
            modeling_pi05,
            "get_gemma_config",
            lambda name: modeling_pi05.GemmaConfig(
                width=widths[name], depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=16
            ),
        )
        yield


def write_lerobot(kind: str, folder: Path, spread: float = 3.0, **fields: Any) -> Any:
    """LeRobot's policy of random weights, `spread` times wider than it makes them, saved by LeRobot to `folder`; `fields` of its config."""
    own = {"image_resolution": [IMAGE_SIZE, IMAGE_SIZE], "num_inference_steps": 4}
    if kind == "smolvla":
        write_smolvlm(folder / "vlm")
        own = {"vlm_model_name": str(folder / "vlm"), "num_vlm_layers": 4, "num_steps": 4}
        own |= {
            "resize_imgs_with_padding": [IMAGE_SIZE, IMAGE_SIZE],
            "train_expert_only": False,
            "freeze_vision_encoder": False,
        }
    torch.manual_seed(0)
    config = draccus.decode(PreTrainedConfig.get_choice_class(kind), FEATURES | SIZES | own | fields)
    policy = get_policy_class(kind)(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    policy.save_pretrained(folder)
    return policy.eval()
