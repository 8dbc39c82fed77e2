"""An OpenVLA of random weights, small enough for a CPU: the real classes, ids and code paths, for tests and dry runs."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from trl_stare.policies.openvla.configuration import OpenVLAConfig
from trl_stare.policies.openvla.modeling import EMPTY_TOKEN_ID, OpenVLAForActionPrediction
from trl_stare.policies.openvla.oft import OpenVLAOFTPolicy
from trl_stare.policies.openvla.policy import OpenVLAPolicy
from trl_stare.policies.openvla.processing import OpenVLAImageProcessor, OpenVLAProcessor

TINY_TOWERS = {
    "tiny_dino": {
        "width": 32,
        "depth": 4,
        "heads": 2,
        "mlp_width": 128,
        "layer_scale": True,
        "class_token": True,
        "register_tokens": 4,
    },
    "tiny_siglip": {"width": 48, "depth": 5, "heads": 3, "mlp_width": 179, "attention_pool": True},
}
"""Fields of [`VisionTower`]; the sizes of the checkpoint that the published code wrote for our tests."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Characters and bytes under Llama's special ids: `<s>` 1, `</s>` 2, `<pad>` 32000, the lone space 29871."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = [chr(code) for code in range(33, 127)]
    vocabulary |= {letter: 1000 + i for i, letter in enumerate(letters)} | {"▁": EMPTY_TOKEN_ID}
    # what no text is split into fills Llama's 32000 ids, so that the padding token added next is the 32000th
    taken = set(vocabulary.values())
    vocabulary |= {f"<filler_{i}>": i for i in range(32000) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    fast.add_special_tokens({"pad_token": "<PAD>"})
    return fast


def create_tiny_openvla(norm_stats: dict[str, Any], **config: Any) -> OpenVLAPolicy:
    """A random OpenVLA with two ViTs on 56 x 56 pixels and two Llama layers (4.5 M parameters, most of them embeddings).

    Args:
        norm_stats (`dict`): `{key: {"action": {"q01": [A], "q99": [A], "mask": [A]}}}`.
        config: for [`OpenVLAConfig`]; with `oft` the policy is an [`OpenVLAOFTPolicy`].
    """
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1}
    settings = {
        "timm_model_ids": list(TINY_TOWERS),
        "vision_towers": TINY_TOWERS,
        "image_sizes": [56, 56],
        "text_config": text | config.pop("text_config", {}),
        "norm_stats": norm_stats,
    }
    model = OpenVLAForActionPrediction(OpenVLAConfig(**settings | config)).eval()
    policy_class = OpenVLAPolicy if model.config.oft is None else OpenVLAOFTPolicy
    return policy_class(model, OpenVLAProcessor(OpenVLAImageProcessor.of_config(model.config), build_tokenizer()))
