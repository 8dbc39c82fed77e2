"""What tells one checkpoint from another."""

import json

import torch
from peft import LoraConfig, get_peft_model

from trl_stare.evaluation import file_digests, resolve_policy
from trl_stare.policies import TokenPolicy

STATS = {"toy": {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}}


def test_an_adapter_is_another_policy_on_another_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    TokenPolicy.create_tiny(STATS, image_size=16, chunk_size=1).save_pretrained(base)
    policy = TokenPolicy.from_pretrained(base)
    policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"]))
    policy.save_pretrained(adapter)
    files = resolve_policy(str(adapter)).files
    assert files == file_digests(adapter) | {f"base/{name}": digest for name, digest in file_digests(base).items()}
    assert "adapter_model.safetensors" in files and "base/model.safetensors" in files
    TokenPolicy.create_tiny(STATS, image_size=16, chunk_size=1).save_pretrained(base)
    again = resolve_policy(str(adapter)).files
    assert {name for name in files if files[name] != again[name]} == {"base/model.safetensors"}
    (base / "training_args.bin").write_bytes(b"where the run was")
    assert resolve_policy(str(adapter)).files == again, "no weights: two runs to one end are one policy"


def test_the_base_of_an_adapter_is_of_the_revision_that_it_was_trained_on(tmp_path, monkeypatch):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    asked = []
    monkeypatch.setattr(
        "trl_stare.evaluation.provenance.checkpoint_folder",
        lambda model, revision=None: asked.append((model, revision)) or tmp_path / "snapshot",
    )
    for base, revision in (("user/base", "v1"), ("user/base", None), (str(tmp_path / "snapshot"), "v1")):
        adapter = {"base_model_name_or_path": base, "revision": revision}
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
        assert "base/config.json" in resolve_policy(str(tmp_path)).files
    assert asked == [("user/base", "v1"), ("user/base", None)]  # a folder is what it is
