"""Tiny random models of transformers' real classes as VLAs: appended action tokens and reused rows."""

import math

import pytest
import torch
from hf_vlm_toy import IMAGE, TEXT, VISION, make_llava, make_llava_vla
from openvla_toy import OPENVLA_STATS, make_obs
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from trl_stare.policies import HFVLMPolicy, TokenPolicy
from trl_stare.policies.conformance import PolicyConformance
from trl_stare.policies.tiny.processing import build_tokenizer

QWEN_TEXT = {k: v for k, v in TEXT.items() if k != "head_dim"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}
QWEN_VISION = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 48,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": [1],
    "window_size": 56,
}


class Processor:
    """What a model's own processor does, without its tokenizer's files: bytes, left padding, placeholders first."""

    def __init__(self, kind: str, placeholders: int):
        self.kind, self.placeholders = kind, placeholders

    def __call__(self, images, text, padding, padding_side, return_tensors):
        assert padding and padding_side == "left" and return_tensors == "pt" and len(images) == len(text)
        rows = [[1, *[IMAGE] * self.placeholders, *(3 + b for b in t.encode())] for t in text]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        stride = 1 if self.kind == "qwen" else 2
        pixels = torch.stack([torch.from_numpy(image[0][::stride, ::stride].copy()) for image in images])
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        data = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}
        if self.kind == "smolvlm":
            data["pixel_values"] = pixels[:, None]
        if self.kind == "qwen":
            # [patches, channels * 2 frames * 14 * 14], all images below each other
            patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            data["pixel_values"] = patches[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1)
            data["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(text))
            data["mm_token_type_ids"] = (ids == IMAGE).long()
        return BatchFeature(data)

    def save_pretrained(self, folder):
        pass


def make_smolvlm():
    config = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "scale_factor": 2}
    return SmolVLMForConditionalGeneration(SmolVLMConfig(image_token_id=IMAGE, pad_token_id=0, **config))


def make_paligemma_vla() -> HFVLMPolicy:
    """With its own processor, which adds labels to what it prepares."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(0, 0)
    text = {"model_type": "gemma", **TEXT, "vocab_size": len(tokenizer)}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config=text,
        projection_dim=48,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = SiglipImageProcessor(size={"height": 28, "width": 28}, image_seq_length=4)
    return HFVLMPolicy.create(
        PaliGemmaForConditionalGeneration(config).eval(),
        PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer),
        norm_stats=OPENVLA_STATS,
        prompt="<image>{instruction}",
        num_bins=21,
    )


def make_qwen():
    special = {
        "image_token_id": IMAGE,
        "video_token_id": 510,
        "vision_start_token_id": 509,
        "vision_end_token_id": 508,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION, **special)
    )


def make_policy(make_model, kind: str, placeholders: int) -> HFVLMPolicy:
    torch.manual_seed(0)
    ids = list(range(499, 243, -1))  # 256 reused rows, the lowest bin last, as in OpenVLA
    settings = {"norm_stats": OPENVLA_STATS, "prompt": "{instruction}:", "action_token_ids": ids}
    return HFVLMPolicy.create(make_model().eval(), Processor(kind, placeholders), **settings)


class HFConformance(PolicyConformance):
    image_size, images_stay_uint8 = 56, False

    def load(self, policy, folder):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        return HFVLMPolicy(model, policy.processor)


class TestLlava(HFConformance):
    @pytest.fixture(scope="class")
    def policy(self):
        return make_policy(make_llava, "llava", 4)

    def test_pictures_are_those_of_its_vision_tower(self, policy):
        assert policy.image_size == 28


class TestSmolVLM(HFConformance):
    @pytest.fixture(scope="class")
    def policy(self):
        return make_policy(make_smolvlm, "smolvlm", 1)


class TestPaliGemmaWithItsOwnProcessor(PolicyConformance):
    image_size, images_stay_uint8 = 56, False

    @pytest.fixture(scope="class")
    def policy(self):
        return make_paligemma_vla()

    def load(self, policy, folder):
        return TokenPolicy.from_pretrained(folder)


class TestQwen25VL(HFConformance):
    @pytest.fixture(scope="class")
    def policy(self):
        return make_policy(make_qwen, "qwen", 4)

    def test_pictures_of_any_size_are_read(self, policy):
        assert policy.image_size is None


class TestLlavaWithItsOwnProcessorAndAppendedTokens(PolicyConformance):
    """Everything real, chunks of two steps: what `create` made is found again by `TokenPolicy.from_pretrained`."""

    image_size, images_stay_uint8 = 56, False

    @pytest.fixture(scope="class")
    def policy(self):
        return make_llava_vla()

    def test_tokens_were_appended(self, policy):
        ids = policy.processor.tokenizer.convert_tokens_to_ids(["<action_0>", "<action_20>"])
        assert policy.action_token_ids[[0, -1]].tolist() == ids and policy.num_tokens == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_appended_tokens_are_spread_as_the_others_are(dtype):
    """A LoRA changes no row: bins whose rows were alike could never be told apart."""
    policy = make_llava_vla(dtype)
    for module in (policy.model.get_input_embeddings(), policy.model.get_output_embeddings()):
        new = module.weight.detach()[policy.action_token_ids].float()
        old = module.weight.detach()[: min(policy.action_token_ids)].float()
        distances = torch.pdist(new) / torch.pdist(old).mean()
        assert len(old) + len(new) == len(module.weight) and module.weight.dtype == dtype
        assert distances.min() > 0.5 and distances.mean() == pytest.approx(1, abs=0.1)


def test_rows_to_spare_are_drawn_too_and_known_tokens_keep_theirs():
    policy = make_llava_vla()
    config = {"norm_stats": OPENVLA_STATS, "prompt": "<s><image>{instruction}", "num_bins": 21}
    embeddings = policy.model.get_input_embeddings()
    before = embeddings.weight.detach().clone()
    HFVLMPolicy.create(policy.model, policy.processor, **config)
    assert torch.equal(embeddings.weight, before)
    policy.model.resize_token_embeddings(len(before) + 5)
    with torch.no_grad():
        embeddings.weight[-5:] = 0.0  # as some models have rows for tokens to come
    HFVLMPolicy.create(policy.model, policy.processor, **config | {"num_bins": 24})
    assert len(embeddings.weight) == len(before) + 5 and torch.equal(embeddings.weight[: len(before)], before)
    assert torch.pdist(embeddings.weight.detach()[-5:-2]).min() > 1 and not embeddings.weight[-2:].any()


def test_a_lora_learns_one_chunk():
    policy = make_llava_vla()
    policy.model = get_peft_model(policy.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    inputs, trace = policy.prepare(make_obs("stack")), (torch.arange(14) * 5 % 21)[None]
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = policy.imitation_loss(inputs, trace, torch.ones_like(trace, dtype=torch.bool))
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * math.log(21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_token_ids": [1, 1]}, "must be 2 distinct ids"),
        ({"action_token_ids": [1, 512]}, "2 distinct ids below 512"),
        ({"prompt": "act"}, "must hold `{instruction}`"),
        ({"norm_stats": {}}, "must hold action statistics"),
    ],
)
def test_bad_maps_are_refused(change, message):
    settings = {"norm_stats": OPENVLA_STATS, "prompt": "{instruction}", "action_token_ids": [1, 2]} | change
    with pytest.raises(ValueError, match=message):
        HFVLMPolicy.create(make_llava(), Processor("llava", 4), **settings)


def test_a_model_that_was_not_made_a_vla_is_refused():
    with pytest.raises(ValueError, match="Use `HFVLMPolicy.create`"):
        HFVLMPolicy(make_llava(), Processor("llava", 4))


def test_image_tokens_cannot_be_truncated():
    policy = make_policy(make_llava, "llava", 4)
    inputs = policy.prepare(make_obs("stack"))
    with pytest.raises(ValueError, match="at most 249 tokens, got 301"):
        policy.prepare(make_obs("s" * 295))
    short = inputs | {name: inputs[name][:, 2:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="tokens"):
        policy.act(short, temperature=0.0)
    lost = make_policy(make_llava, "llava", 0)
    with pytest.raises(ValueError, match=r"placeholders in every row, got \[0\]"):
        lost.prepare(make_obs("stack"))


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_entries_of_vla_are_changed_as_fields_of_a_config_are_and_other_statistics_forgotten(tmp_path, adapter):
    folder = tmp_path / "whole"
    make_llava_vla(another=OPENVLA_STATS["bridge_orig"]).save_pretrained(folder)
    if adapter:
        policy, folder = TokenPolicy.from_pretrained(folder, "another"), tmp_path / "adapter"
        policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"]))
        policy.save_pretrained(folder)
    loaded = TokenPolicy.from_pretrained(folder, "another", action_convention="bridge")
    opened = loaded.decode(torch.full((1, 14), 20))[..., 6]
    assert opened.unique().tolist() == [1.0] and loaded.prompt == "<s><image>{instruction}"
    loaded.keep_statistics()
    loaded.save_pretrained(tmp_path / "kept")
    kept = TokenPolicy.from_pretrained(tmp_path / "kept")
    assert kept.unnorm_key == "another" and kept.model.config.vla == loaded.model.config.vla
    assert kept.model.config.vla["action_convention"] == "bridge"
