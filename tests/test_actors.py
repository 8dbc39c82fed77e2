"""Actors by name: what an environment must be for a checkpoint of each family."""

import pytest

from trl_stare.actors import load_actor, load_actors
from trl_stare.policies import TokenPolicy, create_tiny_openvla, create_tiny_pi0

TASK = "StackCube-v1"
QUANTILES = {"my_robot": {"action": {"q01": [-0.1] * 7, "q99": [0.1] * 7}}}
SCALE = {"my_robot": {"action": {"scale": [0.1] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}}


@pytest.mark.parametrize(
    ("make", "chunk_size", "image_size"),
    [
        (lambda: TokenPolicy.create_tiny(SCALE, image_size=16, chunk_size=5), 5, 16),
        (lambda: create_tiny_openvla(QUANTILES), 1, 56),
        (lambda: create_tiny_pi0(QUANTILES, chunk_size=3), 3, 28),
    ],
    ids=["tiny", "openvla", "pi0"],
)
def test_a_checkpoint_says_its_chunk_and_its_pictures(make, chunk_size, image_size, tmp_path):
    make().save_pretrained(tmp_path)
    actor = load_actor(str(tmp_path), TASK)
    assert (actor.name, actor.chunk_size, actor.image_size) == (str(tmp_path), chunk_size, image_size)


def test_how_a_checkpoint_is_loaded(tmp_path):
    policy = create_tiny_openvla(QUANTILES)
    policy.model.config.norm_stats["another"] = QUANTILES["my_robot"]
    policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unnorm_key"):
        load_actor(str(tmp_path), TASK)
    actors = load_actors(str(tmp_path), (TASK, "PushCube-v1"), unnorm_key="another", action_convention="bridge")
    assert actors[TASK] is actors["PushCube-v1"], "loaded once"
    with pytest.raises(ValueError, match="unnorm_key must be left out unless a checkpoint acts, got 'expert'"):
        load_actor("expert", TASK, unnorm_key="another")


def test_every_task_has_a_demonstrator_of_its_own():
    actors = load_actors("expert", (TASK, "PushCube-v1"))
    assert list(actors) == [TASK, "PushCube-v1"] and actors[TASK] is not actors["PushCube-v1"]


def test_who_looks_at_no_picture_says_no_size():
    assert [load_actor(name, TASK).image_size for name in ("expert", "random")] == [None, None]
