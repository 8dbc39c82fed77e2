"""The small VLA behind the policy protocol: bins, sampling, scoring, saving."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_stare.interfaces import Observation, VLAPolicy
from trl_stare.policies import ActionBins, StareVLAPolicy, TokenPolicy, adapters, norm_stats
from trl_stare.policies.adapters import MERGED_FROM, merge_checkpoint, whole_checkpoint

STATS = {
    "StackCube-v1": {
        "action": {"scale": [0.7, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]},
        "state": {"mean": [0.0] * 8, "std": [1.0] * 8},
    }
}


def make_policy(**config) -> TokenPolicy:
    torch.manual_seed(0)
    policy = TokenPolicy.create_tiny(STATS, **{"image_size": 32, "chunk_size": 2} | config)
    policy.model.eval()
    return policy


def make_obs(n: int, instruction: str = "stack the red cube on the green cube", seed: int = 1) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, (instruction,) * n, torch.randn(n, 8, generator=generator))


def test_it_keeps_the_protocol():
    assert isinstance(make_policy(), VLAPolicy)


@pytest.mark.parametrize(
    ("action", "bin_index", "decoded"),
    [(-0.7, 0, -0.7), (0.0, 2, 0.0), (0.35, 3, 0.35), (0.2, 3, 0.35), (9.0, 4, 0.7), (-0.1, 2, 0.0)],
)
def test_bins_by_hand(action, bin_index, decoded):
    bins = ActionBins(torch.tensor([0.7]), num_bins=5, action_dim=1)
    assert bins.encode(torch.tensor([[action]])).item() == bin_index
    assert bins.decode(torch.tensor([[bin_index]])).item() == pytest.approx(decoded)


def test_every_bin_survives_a_round_trip():
    policy = make_policy()
    trace = torch.arange(33)[:, None].expand(33, 14)
    assert torch.equal(policy.encode(policy.decode(trace)), trace)


@pytest.mark.parametrize(
    ("scale", "num_bins", "message"),
    [
        ([1.0], 4, "odd"),
        ([1.0, 1.0], 5, "one per action dimension"),
        ([0.0], 5, "positive"),
        ([float("nan")], 5, "finite"),
    ],
)
def test_bad_bins_are_refused(scale, num_bins, message):
    with pytest.raises(ValueError, match=message):
        ActionBins(torch.tensor(scale), num_bins=num_bins, action_dim=1)


def test_statistics_of_dimensions_that_never_move():
    actions = torch.zeros(100, 7)
    actions[:, 0] = torch.linspace(-0.5, 0.5, 100)
    stats = norm_stats(actions, torch.ones(100, 8))
    assert stats["action"]["scale"][0] == pytest.approx(0.5, abs=0.01)
    actions = torch.cat([actions, torch.zeros(100, 7)])
    actions[7, 1] = -0.2  # in one step of two hundred
    scale = norm_stats(actions, torch.ones(200, 8))["action"]["scale"]
    assert scale[1] == pytest.approx(0.2) and scale[2:] == pytest.approx([1e-3] * 5)
    assert stats["state"]["std"] == [1.0] * 8


def test_a_state_of_another_robot_is_refused():
    with pytest.raises(
        ValueError, match="must hold the 8 values of 'StackCube-v1'.*got 11. Is the checkpoint of another task"
    ):
        make_policy().prepare(make_obs(2)._replace(state=torch.zeros(2, 11)))


def test_unknown_statistics_list_the_known_ones():
    policy = make_policy()
    with pytest.raises(ValueError, match=r"\['StackCube-v1'\], got 'bridge'"):
        StareVLAPolicy(policy.model, policy.processor, unnorm_key="bridge")


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_acting_and_evaluating_agree(temperature):
    policy = make_policy()
    inputs = policy.prepare(make_obs(5))
    sample = policy.act(inputs, temperature=temperature, generator=torch.Generator().manual_seed(0))
    evaluation = policy.evaluate(inputs, sample.trace, temperature=temperature)
    torch.testing.assert_close(evaluation.logps, sample.logps, atol=1e-5, rtol=0)
    assert sample.actions.shape == (5, 2, 7) and sample.trace.shape == (5, 14) and sample.features.shape == (5, 128)


def test_score_is_the_likelihood_of_the_chunk():
    policy = make_policy()
    inputs, trace = policy.prepare(make_obs(3)), torch.randint(0, 33, (3, 14))
    torch.testing.assert_close(policy.score(inputs, trace), policy.evaluate(inputs, trace).logps.sum(-1))


def test_temperature_zero_takes_the_best_and_low_temperature_comes_close():
    policy = make_policy()
    inputs = policy.prepare(make_obs(4))
    best = policy.act(inputs, temperature=0.0, generator=None).trace
    cold = policy.act(inputs, temperature=1e-3, generator=torch.Generator().manual_seed(0)).trace
    assert (best == cold).float().mean() > 0.95


def test_rows_do_not_influence_each_other_also_when_padded():
    policy = make_policy()
    obs = make_obs(2)
    mixed = Observation(obs.images, ("lift the cube", "stack the red cube on the green cube"), obs.state)
    together = policy.model(**policy.prepare(mixed)).logits
    alone = policy.model(**policy.prepare(Observation(obs.images[:1], ("lift the cube",), obs.state[:1]))).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", ["images", "instructions", "state"])
def test_every_input_matters(changed):
    policy = make_policy()
    obs = make_obs(1)
    other = {"images": 255 - obs.images, "instructions": ("push the blue ball",), "state": obs.state + 1}[changed]
    first, second = (policy.model(**policy.prepare(o)).logits for o in (obs, obs._replace(**{changed: other})))
    assert (first - second).abs().max() > 1e-3


def test_words_outside_the_vocabulary_fall_back_to_bytes():
    tokenizer = make_policy().processor.tokenizer
    ids = tokenizer("schraubenzieher 螺丝刀", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids).strip() == "schraubenzieher 螺丝刀"


def test_images_of_another_size_are_resized():
    policy = make_policy()
    obs = make_obs(1)
    large = obs._replace(images=obs.images.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert policy.prepare(large)["pixel_values"].shape == (1, 3, 32, 32)


def test_saving_is_exact_and_auto_classes_find_it(tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path)
    loaded = TokenPolicy.from_pretrained(tmp_path)
    inputs = policy.prepare(make_obs(3))
    reloaded = loaded.prepare(make_obs(3))
    assert all(torch.equal(inputs[name], reloaded[name]) for name in inputs)
    assert torch.equal(policy.model(**inputs).logits, loaded.model(**reloaded).logits)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)).__name__ == "StareVLAForActionPrediction"
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "StareVLAProcessor"


def put_in_cache(cache: Path, name: str, revision: str, policy: TokenPolicy) -> Path:
    """Save as a commit of the Hub's repository `user/name` that was downloaded to `cache`."""
    repo, commit = cache / f"models--user--{name}", f"{int.from_bytes(revision.encode()):040x}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    if hasattr(policy.model, "peft_config"):  # the cache remembers what the Hub has not
        (repo / ".no_exist" / commit).mkdir(parents=True)
        (repo / ".no_exist" / commit / "config.json").touch()
    policy.save_pretrained(repo / "snapshots" / commit)
    return repo / "snapshots" / commit


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_revision_is_of_model_config_and_processor(tmp_path, adapter):
    """Two commits in a cache of the Hub's; `main` is the second."""
    make_policy(image_size=16).save_pretrained(tmp_path / "base")
    for name, image_size in (("v1", 16), ("main", 32)):
        policy = TokenPolicy.from_pretrained(tmp_path / "base") if adapter else make_policy(image_size=image_size)
        policy.model.config.norm_stats = {name: STATS["StackCube-v1"]}
        policy.processor.image_processor.image_size = image_size
        if adapter:
            policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"]))
        put_in_cache(tmp_path / "cache", "vla", name, policy)
    for options, key, image_size in (({"revision": "v1"}, "v1", 16), ({}, "main", 32)):
        loaded = TokenPolicy.from_pretrained("user/vla", cache_dir=tmp_path / "cache", **options)
        assert (loaded.unnorm_key, loaded.processor.image_processor.image_size) == (key, image_size)


@pytest.mark.parametrize("named", [None, "old"])
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_revision_of_an_adapter_is_not_demanded_of_its_base(tmp_path, revision, named):
    """The base has no `v1`; its own revision the adapter names, as PEFT writes it, or it is `main`."""
    inputs, trace, scores = make_policy().prepare(make_obs(1)), torch.arange(14)[None], {}
    bases = {"main": make_policy(), "old": make_policy()}
    torch.nn.init.normal_(bases["old"].model.get_output_embeddings().weight)
    for name, base in bases.items():
        put_in_cache(tmp_path, "base", name, base)
    for name in ("v1", "main"):
        policy = TokenPolicy.from_pretrained("user/base", cache_dir=tmp_path, revision=named)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        policy.model = get_peft_model(policy.model, lora, revision=named)
        policy.processor.image_processor.image_size = 16 if name == "v1" else 32
        folder = put_in_cache(tmp_path, "lora", name, policy)
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("user/base", named)
        scores[name] = policy.score(inputs, trace).item()
    options = {} if revision is None else {"revision": revision}
    loaded = TokenPolicy.from_pretrained("user/lora", cache_dir=tmp_path, **options)
    assert loaded.score(inputs, trace).item() == pytest.approx(scores[revision or "main"], rel=1e-5)
    assert len({*scores.values()}) == 2
    local = TokenPolicy.from_pretrained(folder, cache_dir=tmp_path)
    assert local.score(inputs, trace).item() == pytest.approx(scores["main"], rel=1e-5)
    assert loaded.processor.image_processor.image_size == (16 if revision else 32)


def test_it_learns_to_see():
    """Twelve images, twelve actions: the loss of imitating them falls by more than a factor of ten."""
    policy = make_policy(soft_bins=0.0)
    policy.model.train()
    inputs, trace = policy.prepare(make_obs(12)), torch.randint(0, 33, (12, 14))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(80):
        loss = policy.imitation_loss(inputs, trace, torch.ones_like(trace, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses[::20]


def test_masked_tokens_and_weights_do_what_they_say():
    policy = make_policy()
    inputs, trace = policy.prepare(make_obs(2)), torch.randint(0, 33, (2, 14))
    mask = torch.ones_like(trace, dtype=torch.bool)
    mask[:, 7:] = False
    changed = trace.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 33
    assert policy.imitation_loss(inputs, trace, mask).item() == policy.imitation_loss(inputs, changed, mask).item()
    first = policy.imitation_loss({k: v[:1] for k, v in inputs.items()}, trace[:1], mask[:1])
    weighted = policy.imitation_loss(inputs, trace, mask, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(weighted, first, atol=1e-5, rtol=1e-5)


def save_adapter(folder: Path, base: Path) -> TokenPolicy:
    """A LoRA of random weights on the checkpoint `base`."""
    policy = TokenPolicy.from_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy.model = get_peft_model(policy.model, lora)
    policy.save_pretrained(folder)
    return policy


def test_an_adapter_s_whole_checkpoint_acts_as_it_does_and_can_be_trained(tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "base")
    assert whole_checkpoint(tmp_path / "base", tmp_path / "merged") == tmp_path / "base"
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "base")
    for _ in range(2):  # the second time it is there
        assert whole_checkpoint(tmp_path / "adapter", tmp_path / "merged") == tmp_path / "merged"
    whole = TokenPolicy.from_pretrained(tmp_path / "merged")
    inputs = policy.prepare(make_obs(3))
    trace = policy.act(inputs, temperature=1.0, generator=torch.Generator().manual_seed(0)).trace
    torch.testing.assert_close(whole.score(inputs, trace), adapted.score(inputs, trace), atol=1e-4, rtol=1e-4)
    assert (whole.score(inputs, trace) - policy.score(inputs, trace)).abs().max() > 1e-2
    assert all(parameter.requires_grad for parameter in whole.model.parameters())


def test_modules_that_were_trained_as_a_whole_are_merged_too(tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "base")
    adapted = TokenPolicy.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["state_projector"], init_lora_weights=False)
    adapted.model = get_peft_model(adapted.model, lora)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    whole = TokenPolicy.from_pretrained(whole_checkpoint(tmp_path / "adapter", tmp_path / "merged"))
    assert whole.model.state_dict().keys() == policy.model.state_dict().keys()
    assert same_scores(whole, adapted) and not same_scores(whole, policy)


@pytest.mark.parametrize("killed_in", [None, "merge_adapter", "replace", "unlink"])
def test_a_merge_in_place_can_be_killed_at_any_moment(tmp_path, monkeypatch, killed_in):
    make_policy().save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`folder` must hold an adapter, got base without"):
        merge_checkpoint("base")

    def kill(*args, **kwargs):
        raise InterruptedError

    if killed_in is not None:
        owner = {"merge_adapter": adapters, "replace": adapters.os, "unlink": Path}[killed_in]
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(owner, killed_in, kill)
            merge_checkpoint("adapter")
    merge_checkpoint("adapter")
    assert same_scores(TokenPolicy.from_pretrained("adapter"), adapted)
    assert not list(Path("adapter").glob("adapter_*")) and not Path("adapter.part").exists()
    adapted.save_pretrained("adapter")  # a phase that is run again finds whole weights there
    merge_checkpoint("adapter")
    assert same_scores(TokenPolicy.from_pretrained("adapter"), adapted)


def test_an_adapter_finds_its_base_from_everywhere(tmp_path, monkeypatch):
    make_policy().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapted = save_adapter(Path("adapter"), Path("base"))
    monkeypatch.chdir("/")
    assert same_scores(TokenPolicy.from_pretrained(tmp_path / "adapter"), adapted)


def same_scores(one: TokenPolicy, other: TokenPolicy) -> bool:
    """Whether two policies give one trace the same log-probabilities, up to what merging rounds."""
    trace = torch.arange(14)[None].expand(3, -1) % 33
    scores = [policy.score(policy.prepare(make_obs(3)), trace) for policy in (one, other)]
    return torch.allclose(*scores, atol=1e-4, rtol=1e-4)


@pytest.fixture
def two_adapters(tmp_path) -> tuple[Path, Path, Path]:
    """Two adapters of the same settings with other weights, and where the first is merged."""
    make_policy().save_pretrained(tmp_path / "base")
    for name in ("first", "second"):  # one after the other: random weights
        save_adapter(tmp_path / name, tmp_path / "base")
    merged = whole_checkpoint(tmp_path / "first", tmp_path / "merged", dtype="float32", attn_implementation="eager")
    return tmp_path / "first", tmp_path / "second", merged


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_what_was_merged_from_another_adapter_is_refused(two_adapters):
    first, second, merged = two_adapters
    before = weights_of(merged)
    with pytest.raises(
        ValueError, match=r"merged from `.*second`, got one with other \['adapter_model.safetensors'\]"
    ):
        whole_checkpoint(second, merged, dtype="float32")
    with pytest.raises(ValueError, match=r"with other \['dtype'\]. Use another `output_dir`"):
        whole_checkpoint(first, merged, dtype="bfloat16")
    settings = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    with pytest.raises(ValueError, match=r"with other \['lora_alpha'\]"):
        whole_checkpoint(first, merged, dtype="float32")
    shutil.rmtree(first)
    shutil.move(second, first)  # trained anew
    with pytest.raises(ValueError, match=r"with other \['adapter_model.safetensors'\]"):
        whole_checkpoint(first, merged, dtype="float32")
    assert weights_of(merged) == before
    assert weights_of(whole_checkpoint(first, merged.with_name("other"), dtype="float32")) != before


def test_what_was_merged_from_the_same_adapter_is_taken_also_if_that_was_saved_again(two_adapters):
    first, _, merged = two_adapters
    settings = json.loads((first / "adapter_config.json").read_text())
    settings["target_modules"].reverse()  # PEFT writes them in the order of a set
    (first / "adapter_config.json").write_text(json.dumps(settings))
    before = (merged / "model.safetensors").stat().st_mtime_ns
    assert whole_checkpoint(first, merged, dtype="float32", attn_implementation="sdpa") == merged
    assert (merged / "model.safetensors").stat().st_mtime_ns == before


def test_what_does_not_say_of_what_it_was_merged_is_refused(two_adapters):
    first, _, merged = two_adapters
    (merged / MERGED_FROM).unlink()
    with pytest.raises(ValueError, match=f"got one without {MERGED_FROM}"):
        whole_checkpoint(first, merged, dtype="float32")


def test_an_interrupted_merge_is_not_taken_for_a_finished_one(two_adapters, monkeypatch):
    first, second, merged = two_adapters
    folder, part = merged.with_name("again"), merged.with_name("again.part")
    save = TokenPolicy.save_pretrained

    def killed(policy, folder):
        save(policy, folder)
        (folder / "of_the_first.json").touch()
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(TokenPolicy, "save_pretrained", killed)
        whole_checkpoint(first, folder)
    assert part.exists() and not folder.exists()
    assert whole_checkpoint(second, folder) == folder
    assert not part.exists() and not (folder / "of_the_first.json").exists()
    assert weights_of(folder) == weights_of(whole_checkpoint(second, folder.with_name("fresh")))


def test_mask_and_weights_are_taken_to_where_the_model_is(monkeypatch):
    policy = make_policy()
    logits = torch.zeros(2, 14, 33, device="meta")
    monkeypatch.setattr(policy, "action_logits", lambda inputs, trace: (logits, None))
    trace = torch.zeros(2, 14, dtype=torch.long)
    loss = policy.imitation_loss({}, trace, torch.ones_like(trace, dtype=torch.bool), torch.ones(2))
    assert loss.device == logits.device
