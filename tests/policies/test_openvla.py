"""OpenVLA against the outputs of the published code, and against itself: batches, caches, precisions, adapters."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from openvla_toy import make_obs, make_openvla
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from trl_stare.policies import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    OpenVLAImageProcessor,
    OpenVLAProcessor,
    TokenPolicy,
)
from trl_stare.policies.adapters import merge_adapter, merge_checkpoint
from trl_stare.policies.openvla.tiny import TINY_TOWERS


@pytest.fixture(scope="module")
def published(openvla_reference):
    """The model that the published code wrote, and what it computed with it."""
    model, info = OpenVLAForActionPrediction.from_pretrained(
        openvla_reference, vision_towers=TINY_TOWERS, output_loading_info=True
    )
    values = {name: torch.from_numpy(v) for name, v in np.load(openvla_reference / "reference.npz").items()}
    return model.eval(), info, values


@pytest.fixture(scope="module")
def policy():
    return make_openvla()


def test_the_tensors_of_openvla_7b(openvla_reference):
    published = json.loads((openvla_reference / "openvla_7b_tensors.json").read_text())
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig())
    assert {name: [*tensor.shape] for name, tensor in model.state_dict().items()} == published
    assert len(published) == 982 and model.num_parameters() == 7_541_237_184
    # RL4VLA's LoRA: r 32 on all linear layers but the head, 1.4 % of the weights
    adapted = get_peft_model(model, LoraConfig(r=32, lora_alpha=16, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters()[0] == 109_563_904


def test_a_published_checkpoint_loads_whole(published):
    _, info, _ = published
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
def test_hidden_states_and_logits_are_the_published_ones(published):
    model, _, values = published
    output = model(input_ids=values["input_ids"], pixel_values=values["pixel_values"])
    for name, ours in (
        ("projector_features", output.image_hidden_states),
        ("last_hidden_state", output.last_hidden_state),
        ("logits", output.logits),
    ):
        torch.testing.assert_close(ours, values[name], atol=2e-5, rtol=0)


def test_greedy_tokens_and_action_are_the_published_ones(published):
    model, _, values = published
    arguments = {"pixel_values": values["pixel_values"], "do_sample": False}
    tokens = model.generate(values["input_ids"], max_new_tokens=7, **arguments)
    assert torch.equal(tokens[0, -7:], values["generated"][0, -7:])
    # also without the lone space at the end, as the published README writes the prompt
    for ids in (values["input_ids"], values["input_ids"][:, :-1]):
        action = model.predict_action(ids, unnorm_key="bridge_orig", **arguments)
        np.testing.assert_allclose(action, values["action"].numpy(), atol=1e-12)
    with pytest.raises(ValueError, match=r"\['bridge_orig'\], got 'fractal'"):
        model.predict_action(values["input_ids"], unnorm_key="fractal", **arguments)


def test_what_we_save_has_the_published_names_and_fields(published, openvla_reference, tmp_path):
    model, _, _ = published
    model.save_pretrained(tmp_path)

    def names(folder):
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    assert names(tmp_path) == names(openvla_reference)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (openvla_reference, tmp_path))
    # both fields say by which library the file was written
    for name in set(before) - {"transformers_version", "torch_dtype", "text_config"}:
        assert after[name] == before[name], name
    assert before["text_config"].items() <= after["text_config"].items()


def test_pixels_are_the_published_ones_bit_for_bit(openvla_reference):
    reference = np.load(openvla_reference / "image_processor_reference.npz")
    processor = OpenVLAImageProcessor()
    assert np.array_equal(processor(reference["image"])["pixel_values"], reference["pixel_values"])
    with torch.device("meta"):
        vision = OpenVLAForActionPrediction(OpenVLAConfig()).vision_backbone
    assert np.array_equal(vision.normalize(processor.resize(reference["image"])).numpy(), reference["pixel_values"])


PUBLISHED_PREPROCESSOR = {
    "auto_map": {
        "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
        "AutoProcessor": "processing_prismatic.PrismaticProcessor",
    },
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 56, 56], [3, 56, 56]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
    "processor_class": "PrismaticProcessor",
    "stds": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
    "tvf_do_letterbox": False,
    "tvf_resize_params": [{"size": [56, 56]}] * 2,
    "use_fused_vision_backbone": True,
}


def test_a_folder_as_it_is_published_becomes_a_policy(policy, tmp_path):
    """Published configs point to remote code and name the published classes: ours are used, nothing is asked."""
    policy.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED_PREPROCESSOR))
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is OpenVLAForActionPrediction
    assert type(AutoProcessor.from_pretrained(tmp_path)) is OpenVLAProcessor
    obs, loaded = make_obs("stack"), TokenPolicy.from_pretrained(tmp_path)
    trace = torch.arange(7)[None]
    assert torch.equal(loaded.score(loaded.prepare(obs), trace), policy.score(policy.prepare(obs), trace))
    # what is saved again still points to the remote code, for those who run it
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == config["auto_map"]


def test_importing_the_package_is_enough():
    code = "import trl_stare; from transformers import AutoConfig; print(type(AutoConfig.for_model('openvla')).__module__)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "trl_stare.policies.openvla.configuration"


def test_saving_is_exact(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = TokenPolicy.from_pretrained(tmp_path)
    obs = make_obs("put the carrot on the plate", "stack")
    inputs, reloaded = policy.prepare(obs), loaded.prepare(obs)
    assert type(loaded) is type(policy) and all(torch.equal(inputs[name], reloaded[name]) for name in inputs)
    trace = torch.randint(0, 256, (2, 7))
    assert torch.equal(policy.score(inputs, trace), loaded.score(reloaded, trace))
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_the_prompt_in_ids(policy):
    """`<s>`, 16 patches, the text, the lone space; pad on the left."""
    inputs = policy.prepare(make_obs("Lift the CUBE", "stack"))
    ids = inputs["input_ids"][0]
    assert ids[0] == 1 and (ids[1:17] == 32063).all() and ids[-1] == 29871
    text = policy.processor.tokenizer.decode(ids[17:-1])
    assert text.strip() == "In: What action should the robot take to lift the cube?\nOut:"
    assert inputs["input_ids"][1][:8].tolist() == [32000] * 8 and inputs["attention_mask"][1].sum() == len(ids) - 8
    assert inputs["pixel_values"].dtype == torch.uint8


@torch.no_grad()
def test_patches_inserted_in_the_model_and_in_the_prompt_are_the_same(policy):
    inputs = policy.prepare(make_obs("put the carrot on the plate", "stack"))
    keep = inputs["input_ids"] != policy.model.config.image_token_id
    legacy = inputs | {name: inputs[name][keep].view(2, -1) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(policy.model(**legacy).logits[:, -1], policy.model(**inputs).logits[:, -1])


@torch.no_grad()
def test_a_padded_batch_is_its_rows_one_by_one(policy):
    obs = make_obs("put the carrot on the plate", "stack")
    trace = torch.randint(0, 256, (2, 7))
    batch = policy.evaluate(policy.prepare(obs), trace)
    for row in range(2):
        single = obs._replace(images=obs.images[row : row + 1], instructions=obs.instructions[row : row + 1])
        alone = policy.evaluate(policy.prepare(single), trace[row : row + 1])
        torch.testing.assert_close(batch.logps[row : row + 1], alone.logps, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.features[row : row + 1], alone.features, atol=1e-5, rtol=0)


def test_cached_generation_is_a_chain_of_full_forwards(policy):
    inputs = policy.prepare(make_obs("put the carrot on the plate", "stack"))
    generated = policy.model.generate(**inputs, max_new_tokens=7, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(7):
            logits = policy.model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_rollout_and_training_see_the_same_probabilities(policy, temperature):
    inputs = policy.prepare(make_obs("put the carrot on the plate", "stack", "lift the pot"))
    sample = policy.act(inputs, temperature=temperature, generator=torch.Generator().manual_seed(0))
    evaluation = policy.evaluate(inputs, sample.trace, temperature=temperature)
    torch.testing.assert_close(evaluation.logps, sample.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluation.features, sample.features, atol=1e-5, rtol=0)


def test_a_model_that_does_not_see_is_refused(policy, monkeypatch):
    inputs = policy.prepare(make_obs("stack"))
    monkeypatch.setattr(policy, "_tested", False)
    monkeypatch.setattr(policy.model, "get_image_features", lambda pixels: torch.zeros(len(pixels), 16, 64))
    with pytest.raises(ValueError, match="must look at the image"):
        policy.act(inputs, temperature=1.0, generator=None)


def test_half_precision(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    half = TokenPolicy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs, trace = policy.prepare(make_obs("stack")), torch.randint(0, 256, (1, 7))
    assert half.model.dtype == torch.bfloat16
    sample = half.act(inputs, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert sample.logps.dtype == torch.float32 and sample.actions.dtype == torch.float32
    assert (half.score(inputs, trace) - policy.score(inputs, trace)).abs() < 0.5


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = make_openvla()
        policy.model.train()
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs, trace = policy.prepare(make_obs("stack", "lift the pot")), torch.arange(14).view(2, 7)
        policy.act(inputs, temperature=0.0)  # the cache must work meanwhile
        assert policy.model.training
        policy.score(inputs, trace).sum().backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_adapters():
    """All linear layers but the head learn; without the adapter it is the base; merging leaves the base alone."""
    policy = make_openvla()
    inputs, trace = policy.prepare(make_obs("stack", "lift the pot")), torch.arange(14).view(2, 7)
    base = policy.score(inputs, trace).detach()
    weights = {name: p.clone() for name, p in policy.model.named_parameters()}
    policy.model = get_peft_model(policy.model, LoraConfig(r=32, lora_alpha=16, target_modules="all-linear"))
    policy.score(inputs, trace).sum().backward()
    adapted = {name for name, p in policy.model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in adapted) and not any("lm_head" in name for name in adapted)
    assert {"vision_backbone", "projector", "language_model"} <= {name.split(".")[2] for name in adapted}
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    changed = policy.score(inputs, trace).detach()
    assert (changed - base).abs().min() > 1e-2
    with policy.model.disable_adapter():
        assert torch.equal(policy.score(inputs, trace), base)
    merged = type(policy)(merge_adapter(policy.model), policy.processor)
    torch.testing.assert_close(merged.score(inputs, trace), changed, atol=1e-3, rtol=1e-4)
    inner = policy.model.get_base_model()
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        kept = dict(inner.named_parameters())
        assert torch.equal(kept.get(name, kept.get(f"{layer}.base_layer.{kind}")), weight), name
    assert merged.model.state_dict().keys() == weights.keys()


def test_an_adapter_is_saved_with_its_own_config_and_fits_its_base_only(policy, tmp_path):
    base, adapter, other = (tmp_path / name for name in ("base", "adapter", "other"))
    policy.save_pretrained(base)
    trained = TokenPolicy.from_pretrained(base, action_convention="bridge")
    trained.model = get_peft_model(
        trained.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    trained.save_pretrained(adapter)
    loaded = TokenPolicy.from_pretrained(adapter)
    inputs, trace = policy.prepare(make_obs("stack")), torch.arange(7)[None]
    assert not torch.equal(loaded.score(inputs, trace), policy.score(inputs, trace))
    torch.testing.assert_close(loaded.score(inputs, trace), trained.score(inputs, trace))
    assert loaded.decode(trace)[0, 0, 6] == -1 and torch.equal(loaded.decode(trace), trained.decode(trace))
    # merged it is a checkpoint like any other
    shutil.copytree(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "value_head.safetensors").write_text("stays")
    merge_checkpoint(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter_*"))
    assert (tmp_path / "merged" / "value_head.safetensors").is_file()
    merged = TokenPolicy.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.score(inputs, trace), trained.score(inputs, trace), atol=1e-3, rtol=1e-4)
    assert merged.model.state_dict().keys() == policy.model.state_dict().keys()
    make_openvla(text_config={"hidden_size": 32}).save_pretrained(other)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    with pytest.raises(RuntimeError):
        TokenPolicy.from_pretrained(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timm_model_ids": ["tiny_dino", "beit"]}, r"among .*got \['beit'\]"),
        ({"timm_model_ids": ["tiny_dino"], "image_sizes": [56]}, "two towers"),
    ],
)
def test_unknown_towers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_openvla(**change)


def test_bad_input_is_refused(policy, tmp_path):
    inputs = policy.prepare(make_obs("stack"))
    with pytest.raises(ValueError, match="16 image placeholders"):
        policy.model(
            **inputs | {"input_ids": inputs["input_ids"][:, 8:], "attention_mask": inputs["attention_mask"][:, 8:]}
        )
    with pytest.raises(ValueError, match=r"\[N, 6, 56, 56\]"):
        policy.model(**inputs | {"pixel_values": torch.zeros(1, 6, 224, 224)})
    with pytest.raises(ValueError, match="at most 505 tokens"):
        policy.prepare(make_obs("stack " * 100))
    with pytest.raises(ValueError, match="uint8 arrays, got float32"):
        policy.processor.image_processor.resize(np.zeros((56, 56, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="got 'letterbox'"):
        OpenVLAImageProcessor(image_resize_strategy="letterbox")
    with pytest.raises(ValueError, match="got none. Is this checkpoint a VLA"):
        make_openvla(norm_stats={})
    with pytest.raises(ValueError, match="like the model's towers"):
        type(policy)(policy.model, SimpleNamespace(image_processor=OpenVLAImageProcessor()))


def test_a_checkpoint_that_is_no_vla_is_refused(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 32, **small},
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **small},
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a VLA, one of .*'openvla'.*got 'llava'"):
        TokenPolicy.from_pretrained(tmp_path)
