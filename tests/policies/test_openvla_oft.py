"""OpenVLA-OFT: what the published code computes, what a token may see, what a checkpoint must bring along."""

import json
from itertools import product

import pytest
import torch
from openvla_toy import OPENVLA_STATS, make_obs, make_openvla
from peft import LoraConfig, get_peft_model

from trl_stare.interfaces import Observation
from trl_stare.policies import OpenVLAOFTPolicy, OpenVLAPolicy, TokenPolicy
from trl_stare.policies.conformance import PolicyConformance

LONG = "put the carrot on the plate"
PROPRIO = {"q01": [-1.0, 0.0, 2.0], "q99": [1.0, 4.0, 2.0]}
STATS = {"bridge_orig": OPENVLA_STATS["bridge_orig"] | {"proprio": PROPRIO}}


def make_oft(norm_stats=STATS, action_convention="identity", **oft) -> OpenVLAOFTPolicy:
    return make_openvla(norm_stats, action_convention=action_convention, oft={"chunk_size": 2} | oft)


def two_cameras(obs: Observation) -> Observation:
    return obs._replace(images=torch.stack([obs.images, obs.images.flip(1)], dim=1))


class TestLIBERO(PolicyConformance):
    """openvla-oft's own: 8 steps, every token sees every other, `</s>` behind them."""

    @pytest.fixture(scope="class")
    def policy(self):
        return make_oft(chunk_size=8, action_convention="libero")


class TestBridge(PolicyConformance):
    """5 steps; causal, as the published code is under stock transformers; without `</s>`, as RLinf has it."""

    @pytest.fixture(scope="class")
    def policy(self):
        return make_oft(chunk_size=5, bidirectional=False, stop_token=False, action_convention="bridge")


class TestTwoCamerasAndProprioception(PolicyConformance):
    state_size = 3

    @pytest.fixture(scope="class")
    def policy(self):
        return make_oft(num_images=2, state_size=3)

    def make_obs(self, *instructions, seed=0):
        return two_cameras(super().make_obs(*instructions, seed=seed))


@torch.no_grad()
@pytest.mark.parametrize(("bidirectional", "stop_token"), product([False, True], repeat=2))
def test_the_published_computation(bidirectional, stop_token):
    """`predict_action` of openvla-oft, step by step, on one prompt: patches behind `<s>`, zeros for 14 tokens, maybe `</s>`, the
    predictions from the last token of the prompt on; its ids 31999, 31998, ... are our bins 0, 1, ..."""
    policy = make_oft(num_images=2, state_size=3, bidirectional=bidirectional, stop_token=stop_token)
    model, obs = policy.model, two_cameras(make_obs(LONG))._replace(state=torch.tensor([[0.5, 1.0, 2.0]]))
    inputs = policy.prepare(obs)

    prompt = inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id]
    embed = model.get_input_embeddings()
    normalized = [model.vision_backbone.normalize(image) for image in inputs["pixel_values"].split(3, dim=1)]
    patches = [model.projector(model.vision_backbone(pixels)) for pixels in normalized]
    # 2 (x - q01) / (q99 - q01) - 1; without a range, as here the third, it is always -1
    proprio = model.proprio_projector(torch.tensor([[0.5, -0.5, -1.0]]))
    assert torch.allclose(inputs["state"], torch.tensor([[0.5, -0.5, -1.0]]))
    text = embed(prompt)[None]
    parts = [text[:, :1], *patches, proprio, text[:, 1:], torch.zeros(1, 14, 64)]
    sequence = torch.cat([*parts, embed(torch.tensor([[2]]))] if stop_token else parts, dim=1)
    # the fork of transformers is stock Llama with a mask that hides nothing
    mask = torch.zeros(1, 1, sequence.shape[1], sequence.shape[1]) if bidirectional else None
    logits = model.language_model(inputs_embeds=sequence, attention_mask=mask).logits

    start = 2 * 16 + 1 + len(prompt) - 1  # NUM_PATCHES + NUM_PROMPT_TOKENS
    expected = logits[:, start : start + 14, 31744:32000].flip(-1).log_softmax(-1)
    sample = policy.act(inputs, temperature=0.0)
    torch.testing.assert_close(sample.logps, expected.amax(-1), atol=1e-5, rtol=0)
    assert torch.equal(sample.trace, expected.argmax(-1))
    # both cameras are read, in their order
    swapped = policy.act(policy.prepare(obs._replace(images=obs.images.flip(1))), temperature=0.0)
    assert (swapped.logps - sample.logps).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("bidirectional", "seen"), [(False, False), (True, True)])
def test_what_stands_behind_the_action_is_seen_by_bidirectional_models_alone(bidirectional, seen):
    """So it matters whether `</s>` is there as it was in training."""
    logps = []
    for stop_token in (False, True):
        policy = make_oft(bidirectional=bidirectional, stop_token=stop_token)
        logps.append(policy.evaluate(policy.prepare(make_obs(LONG, "stack")), torch.zeros(2, 14).long()).logps)
    assert ((logps[1] - logps[0]).abs().max() > 1e-4) == seen


@torch.no_grad()
def test_eager_attention_is_the_same(tmp_path):
    policy = make_oft()
    policy.save_pretrained(tmp_path)
    obs, trace = make_obs(LONG, "stack"), torch.zeros(2, 14).long()
    eager = TokenPolicy.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    expected = policy.evaluate(policy.prepare(obs), trace).logps
    torch.testing.assert_close(eager.evaluate(eager.prepare(obs), trace).logps, expected, atol=1e-5, rtol=0)


def test_one_forward_pass_per_chunk(monkeypatch):
    policy = make_oft(chunk_size=8)
    inputs, passes = policy.prepare(make_obs(LONG, "stack")), []
    policy.act(inputs, temperature=1.0)  # tests itself once
    forward = policy.model.language_model.model.forward
    monkeypatch.setattr(
        policy.model.language_model.model, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k)
    )
    assert policy.act(inputs, temperature=1.0).actions.shape == (2, 8, 7)
    assert len(passes) == 1


def test_settings_travel_with_the_checkpoint_and_a_published_one_gets_them(tmp_path):
    policy = make_oft(chunk_size=5, bidirectional=False)
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # the published code knows no other name, and builds the same model: nothing is added to its tensors
    assert (
        config["model_type"] == "openvla"
        and policy.model.state_dict().keys() == make_openvla().model.state_dict().keys()
    )
    loaded = TokenPolicy.from_pretrained(tmp_path)
    assert type(loaded) is OpenVLAOFTPolicy and loaded.settings == policy.settings
    oft = config.pop("oft")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(TokenPolicy.from_pretrained(tmp_path)) is OpenVLAPolicy
    published = TokenPolicy.from_pretrained(tmp_path, oft=oft)
    inputs, trace = policy.prepare(make_obs("stack")), torch.arange(35)[None]
    assert torch.equal(published.score(inputs, trace), policy.score(inputs, trace))


def test_an_adapter_and_gradient_checkpointing_change_no_value():
    policy = make_oft(state_size=3)
    inputs = policy.prepare(make_obs("stack", LONG)._replace(state=torch.ones(2, 3)))
    trace = torch.arange(28).view(2, 14)
    base = policy.score(inputs, trace).detach()
    policy.model = get_peft_model(
        policy.model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["proprio_projector"])
    )
    policy.model.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    score = policy.score(inputs, trace)
    torch.testing.assert_close(score.detach(), base)
    score.sum().backward()
    names = {name for name, p in policy.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("vision_backbone" in name for name in names) and any("proprio_projector" in name for name in names)


@pytest.mark.parametrize(
    ("oft", "message"),
    [
        ({"chunks": 8}, r"some of .* got \['chunks'\]"),
        ({"chunk_size": 0}, "at least 1"),
        ({"state_size": 7}, "7 finite values of 'q01'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(oft, message):
    with pytest.raises(ValueError, match=message):
        make_oft(**oft)


def test_bad_input_is_refused():
    policy = make_oft(num_images=2, state_size=3)
    obs = two_cameras(make_obs("stack"))._replace(state=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="those of 2 cameras"):
        policy.prepare(obs._replace(images=obs.images[:, 0]))
    with pytest.raises(ValueError, match=r"`\[N, 3\]`, got None"):
        policy.prepare(obs._replace(state=None))
    inputs = policy.prepare(obs)
    with pytest.raises(ValueError, match="2 images in its channels"):
        policy.model(**inputs | {"pixel_values": inputs["pixel_values"][:, :3]})
    with pytest.raises(ValueError, match=r"`\[1, 3\]`"):
        policy.model(**inputs | {"state": None})
    with pytest.raises(ValueError, match="Use its policy's `act`"):
        policy.model.predict_action(**inputs)
    policy.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        policy.model(**inputs)


EVERY = {"q01": [0.0] * 3, "q99": [1.0] * 3, "min": [-1.0] * 3, "max": [3.0] * 3}
EVERY |= {"mean": [0.5, 0.0, 0.1], "std": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("kind", "mask", "state", "expected"),
    [
        ("normal", None, [0.6, 0.2, 0.4], [1.0, 1.0, 1.0]),
        ("normal", None, [0.5, -0.8, 0.7], [0.0, -4.0, 2.0]),  # not clipped
        ("normal", [True, True, False], [0.6, 0.2, 7.0], [1.0, 1.0, 7.0]),
        ("quantiles", None, [0.5, 0.0, 7.0], [0.0, -1.0, 1.0]),
        (None, None, [0.5, 0.0, 7.0], [0.0, -1.0, 1.0]),  # the first that there are
        ("bounds", None, [0.0, 3.0, 7.0], [-0.5, 1.0, 1.0]),
    ],
)
def test_proprioception_is_scaled_by_the_kind_of_statistics_that_scales_actions(kind, mask, state, expected):
    actions = {name: [float(name in ("q99", "max", "std"))] * 7 for name in EVERY}
    stats = {"any": {"action": actions, "proprio": EVERY | ({} if mask is None else {"mask": mask})}}
    policy = make_openvla(stats, oft={"state_size": 3}, action_statistics=kind)
    inputs = policy.prepare(make_obs("stack")._replace(state=torch.tensor([state])))
    torch.testing.assert_close(inputs["state"], torch.tensor([expected]))


def test_checkpoints_with_means_only_have_means_of_proprioception_too():
    normal = {"mean": [0.0] * 7, "std": [1.0] * 7}
    stats = {"any": {"action": normal, "proprio": {name: EVERY[name] for name in ("mean", "std")}}}
    policy = make_openvla(stats, oft={"state_size": 3})
    state = policy.prepare(make_obs("stack")._replace(state=torch.tensor([[0.6, 0.2, 0.4]])))["state"]
    torch.testing.assert_close(state, torch.ones(1, 3))
    with pytest.raises(ValueError, match="3 finite values of 'q01' and 'q99'"):
        make_openvla({"any": stats["any"] | {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}, oft={"state_size": 3})


def test_the_statistics_of_aloha():
    """Its checkpoints have quantiles too, but are scaled by the bounds."""
    stats = {"aloha": {"action": {"q01": [-1.0] * 14, "q99": [1.0] * 14, "min": [-3.0] * 14, "max": [3.0] * 14}}}
    policy = make_openvla(stats, oft={"chunk_size": 25}, action_statistics="bounds")
    assert policy.decode(torch.zeros(1, 350).long()).shape == (1, 25, 14)
    torch.testing.assert_close(policy.decode(torch.zeros(1, 350).long()).max(), torch.tensor(-3 + 3 / 255))
