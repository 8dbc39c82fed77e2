"""A tiny random LLaVA of transformers' real class as a VLA, with its own processor and appended action tokens."""

import torch
from openvla_toy import OPENVLA_STATS
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessor

from trl_stare.policies import HFVLMPolicy
from trl_stare.policies.tiny.processing import build_tokenizer

TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
    "initializer_range": 0.2,
}
IMAGE = 511


def make_llava(**text):
    config = {
        "text_config": {"model_type": "llama", **TEXT, **text},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    }
    vision = {"model_type": "siglip_vision_model", **VISION}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, vision_feature_select_strategy="full", **config)
    )


def make_llava_vla(dtype: torch.dtype = torch.float32, **more_statistics) -> HFVLMPolicy:
    """Chunks of two steps, 21 bins; acts by the statistics of `bridge_orig`. The vocabulary has no row to spare for them."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(0, 0)
    model = make_llava(vocab_size=len(tokenizer)).to(dtype)
    model.config.image_token_id = model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    policy = HFVLMPolicy.create(
        model.eval(),
        processor,
        norm_stats=OPENVLA_STATS,
        prompt="<s><image>{instruction}",
        num_bins=21,
        chunk_size=2,
    )
    policy.model.config.vla["norm_stats"] = OPENVLA_STATS | more_statistics
    return policy
