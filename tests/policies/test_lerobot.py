"""SmolVLA and pi0.5: the conformance of every policy, and the same numbers as LeRobot's own code.

Runs where LeRobot is (docs/flow.md): `make test-lerobot`.
"""

import json
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("lerobot", reason="needs LeRobot, in an environment of its own: docs/flow.md")

from lerobot.policies.factory import get_policy_class  # noqa: E402
from lerobot_toy import FEATURES, IMAGE_SIZE, STATE_SIZE, STATISTICS, make_tokenizer, small_pi05, write_lerobot  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from trl_stare import TokenPolicy  # noqa: E402
from trl_stare.interfaces import Observation  # noqa: E402
from trl_stare.policies import load_lerobot_policy  # noqa: E402
from trl_stare.policies.conformance import PolicyConformance  # noqa: E402
from trl_stare.policies.lerobot import LeRobotFlowPolicy  # noqa: E402


@pytest.fixture(scope="module", params=["smolvla", "pi05"])
def kind(request):
    with small_pi05() if request.param == "pi05" else nullcontext():
        yield request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="module")
def theirs(kind, folder):
    return write_lerobot(kind, folder)


def load(folder, **settings):
    return load_lerobot_policy(folder, tokenizer=make_tokenizer(), norm_stats=STATISTICS, settings=settings)


@pytest.fixture(scope="module")
def policy(theirs, folder):
    return load(folder)


class TestLeRobotFlowPolicy(PolicyConformance):
    image_size, state_size, acts_in_tokens = IMAGE_SIZE, STATE_SIZE, False
    atol = 1e-4

    @pytest.fixture(scope="class")
    def policy(self, theirs, folder):
        return load(folder)


def observe(n=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 2, IMAGE_SIZE + 8, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    return Observation(
        images, ("stack the cube", "put it down", "lift the peg")[:n], torch.randn(n, STATE_SIZE, generator=generator)
    )


def their_batch(policy, obs):
    """The observation as LeRobot's dataloader and processors give it to the policy."""
    inputs = policy.prepare(obs)
    cameras = [name for name in FEATURES["input_features"] if "images" in name]
    pictures = {name: obs.images[:, i].permute(0, 3, 1, 2).float() / 255 for i, name in enumerate(cameras)}
    tokens = {"tokens": inputs["input_ids"], "attention_mask": inputs["attention_mask"].bool()}
    return (
        pictures
        | {"observation.state": obs.state}
        | {f"observation.language.{name}": value for name, value in tokens.items()}
    )


@torch.no_grad()
def test_the_velocity_errors_are_those_of_lerobots_training_loss(policy, theirs):
    obs, generator = observe(), torch.Generator().manual_seed(1)
    actions, noise = torch.randn(3, 4, 7, generator=generator), torch.randn(3, 4, 8, generator=generator)
    time = torch.tensor([0.1, 0.5, 0.9])
    inputs = policy.prepare(obs)
    latent = torch.nn.functional.pad(actions, (0, 1))
    ours = policy._errors(inputs, policy._read(inputs), latent, noise, time)
    batch = their_batch(policy, obs)
    if theirs.name == "smolvla":
        images, seen = theirs.prepare_images(batch)
        state = (theirs.prepare_state(batch),)
    else:
        images, seen = theirs._preprocess_images(batch)
        state = ()
    text = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    losses = theirs.model.forward(images, seen, *text, *state, latent, noise, time)[..., :7]
    torch.testing.assert_close(ours, losses, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_actions_are_lerobots_from_zero_noise(policy, theirs):
    obs = observe()
    batch = their_batch(policy, obs)
    theirs.reset()
    chunk = theirs.predict_action_chunk(batch, noise=torch.zeros(3, 4, 8))
    acted = policy.act(policy.prepare(obs), temperature=0.0)
    torch.testing.assert_close(
        policy.statistics.normalize(acted.actions).float(), chunk[..., :7], atol=1e-4, rtol=1e-4
    )


def test_what_is_saved_has_lerobots_names_and_loads_there(policy, theirs, folder, kind, tmp_path):
    policy.save_pretrained(tmp_path)
    written, original = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == original.keys() and all(torch.equal(written[name], original[name]) for name in written)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = get_policy_class(kind).from_pretrained(tmp_path)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())


def test_fields_of_the_saved_config_can_be_changed(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = TokenPolicy.from_pretrained(tmp_path, chunk_size=2, num_inference_steps=3)
    assert type(loaded) is LeRobotFlowPolicy and loaded.chunk_size == 2
    assert loaded.act(loaded.prepare(observe()), temperature=1.0).actions.shape == (3, 2, 7)


def test_missing_and_left_over_tensors_are_refused(folder, theirs, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.action_in_proj.extra"] = weights.pop("model.action_in_proj.bias")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="missing.*action_in_proj.bias.*left over.*action_in_proj.extra"):
        load(tmp_path)


def test_too_many_cameras_and_too_long_an_instruction(policy):
    obs = observe(1)
    with pytest.raises(ValueError, match="at most 2 cameras"):
        policy.act(policy.prepare(obs._replace(images=obs.images.repeat(1, 2, 1, 1, 1))), temperature=0.0)
    with pytest.raises(ValueError, match="Shorten it"):
        policy.prepare(obs._replace(instructions=("put the cube " * 100,)))


def test_types_without_an_adapter_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"type": "act"}))
    with pytest.raises(ValueError, match="pi0.*pi05.*smolvla.*got type 'act'"):
        load(tmp_path)


def test_the_trainers_bf16(policy):
    """Close to float32, and differentiable."""
    obs = observe()
    inputs = policy.prepare(obs)
    trace = policy.encode(torch.zeros(3, 4, 7))
    with torch.autocast("cpu", torch.bfloat16):
        score = policy.score(inputs, trace)
    score.sum().backward()
    reached = [p for p in policy.model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    policy.model.zero_grad()
    assert reached
    torch.testing.assert_close(score.float(), policy.score(inputs, trace), rtol=0.05, atol=0.0)
