"""Every policy of the package passes the suite it ships; the suite finds the faults it is there for."""

import pytest
import torch
from flow_toy import make_flow
from openvla_toy import make_openvla

from trl_stare.policies import StareVLAPolicy
from trl_stare.policies.conformance import PolicyConformance

TINY_STATS = {
    "StackCube-v1": {
        "action": {"scale": [0.7, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]},
        "state": {"mean": [0.0] * 8, "std": [1.0] * 8},
    }
}


class TestStareVLA(PolicyConformance):
    image_size, state_size = 32, 8

    @pytest.fixture(scope="class")
    def policy(self):
        torch.manual_seed(0)
        policy = StareVLAPolicy.create_tiny(TINY_STATS, image_size=32, chunk_size=2)
        policy.model.eval()
        return policy


class TestOpenVLA(PolicyConformance):
    @pytest.fixture(scope="class")
    def policy(self):
        return make_openvla()


class TestOpenVLAOnTheBridgeTasks(PolicyConformance):
    """The convention travels with the checkpoint: the gripper is -1 or 1."""

    @pytest.fixture(scope="class")
    def policy(self):
        return make_openvla(action_convention="bridge")

    def test_the_gripper_is_the_robots(self, policy):
        _, sample = self.sample(policy, self.make_obs(*["stack"] * 8))
        assert set(sample.actions[..., 6].flatten().tolist()) == {-1.0, 1.0}


class TestFlow(PolicyConformance):
    image_size, state_size, acts_in_tokens = 28, 8, False

    @pytest.fixture(scope="class")
    def policy(self):
        return make_flow()


def broken_logps(policy):
    act = policy.act

    def top_fifty(inputs, **kwargs):
        sample = act(inputs, **kwargs)
        return sample._replace(logps=sample.logps + 0.1)

    policy.act = top_fifty


def broken_sight(policy):
    prepare = policy.prepare
    policy.prepare = lambda obs: prepare(obs._replace(images=torch.zeros_like(obs.images)))


def broken_padding(policy):
    prepare = policy.prepare
    policy.prepare = lambda obs: (inputs := prepare(obs)) | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def broken_encoding(policy):
    encode = policy.encode
    policy.encode = lambda actions: (encode(actions) + 3).clamp(max=32)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        (broken_logps, "test_acting_and_evaluating_agree"),
        (broken_sight, "test_image_and_instruction_matter"),
        (broken_padding, "test_a_padded_batch_is_its_rows_one_by_one"),
        (broken_encoding, "test_actions_survive_encoding"),
    ],
)
def test_faults_are_found(fault, test):
    suite = TestStareVLA()
    policy = StareVLAPolicy.create_tiny(TINY_STATS, image_size=32, chunk_size=2)
    policy.model.eval()
    getattr(suite, test)(policy)
    fault(policy)
    with pytest.raises(AssertionError):
        getattr(suite, test)(policy)
