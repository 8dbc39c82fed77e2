"""Blocks of real episodes: an interruption changes nothing."""

import dataclasses

import pytest

from trl_stare.actors import load_actor
from trl_stare.envs import make_env
from trl_stare.evaluation import play_in_blocks, read_played, write_played
from trl_stare.evaluation.suites import check_distinct, held_out_starts, suite_tasks
from trl_stare.stages import get_plan

TASK = "PushCube-v1"


@pytest.fixture(scope="module")
def env():
    env = make_env(TASK, num_envs=2, num_workers=1, chunk_size=1, image_size=16)
    yield env
    env.close()


def test_a_continued_evaluation_is_the_one_that_was_never_interrupted(env, tmp_path):
    chance, plan, starts = load_actor("random", TASK).make, get_plan(TASK), [7, 5, 6]
    whole = play_in_blocks(env, chance, plan, starts, tmp_path / "whole", seed=1)
    assert [row.result.seed for row in whole] == starts and {row.eval_seed for row in whole} == {1}
    assert {row.result.num_steps for row in whole} == {env.max_episode_steps}

    # the second block is lost
    (tmp_path / "whole" / "1-6.parquet").unlink()
    told, filmed = [], []
    again = play_in_blocks(
        env, chance, plan, starts, tmp_path / "whole", seed=1, on_episode=told.append, on_block=filmed.append
    )
    assert again == whole == told
    assert [[trajectory.seed for trajectory in block] for block in filmed] == [[6]], (
        "the kept block is not played again"
    )

    write_played(tmp_path / "a.parquet", whole)
    write_played(tmp_path / "b.parquet", again)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert read_played(tmp_path / "a.parquet") == whole


def test_what_makes_no_evaluation_is_refused(env, tmp_path):
    chance, plan = load_actor("random", TASK).make, get_plan(TASK)
    with pytest.raises(ValueError, match="at least one seed, each once"):
        play_in_blocks(env, chance, plan, [1, 1], tmp_path, seed=0)
    with pytest.raises(ValueError, match="must be of the environment's task"):
        play_in_blocks(env, chance, dataclasses.replace(plan, task="PullCube-v1"), [1], tmp_path, seed=0)
    (tmp_path / "no.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="must hold the episodes of an evaluation"):
        read_played(tmp_path / "no.parquet")


@pytest.mark.parametrize(
    ("seed", "episodes", "configurations", "starts"),
    [
        (0, None, 0, range(100)),
        (1, None, 24, range(24, 48)),
        (0, None, 64, range(64)),
        (2, 10, 24, range(20, 30)),
        (499, None, 0, range(49_900, 50_000)),
    ],
)
def test_starts(seed, episodes, configurations, starts):
    assert held_out_starts(seed, episodes, configurations) == starts


@pytest.mark.parametrize(("seed", "episodes"), [(0, 0), (500, 100), (-1, 5), (0, 50_001)])
def test_starts_outside_the_held_out_seeds_are_refused(seed, episodes):
    with pytest.raises(ValueError, match="among the held-out seeds 0 to 49999"):
        held_out_starts(seed, episodes, 0)


def test_suites():
    assert suite_tasks("PushCube-v1, PullCube-v1") == ("PushCube-v1", "PullCube-v1")
    assert [get_plan(task).task for task in suite_tasks("simpler_widowx")] == list(suite_tasks("simpler_widowx"))
    assert all(get_plan(task) for task in suite_tasks("maniskill_panda"))
    with pytest.raises(ValueError, match="comma list of different tasks"):
        suite_tasks("PushCube-v1,PushCube-v1")
    with pytest.raises(ValueError, match="got 'simpler'. Did you mean 'simpler_widowx'?"):
        suite_tasks("simpler")
    assert suite_tasks("LiftPegUpright-v1") == ("LiftPegUpright-v1",)


def test_episodes_that_would_repeat_each_other_are_refused():
    check_distinct({0: range(24)}, 24, "T")
    check_distinct({0: range(100), 1: range(100, 200)}, 0, "T")  # the seed draws the start
    check_distinct({0: range(12), 1: range(12, 24)}, 24, "T")
    message = "each of the 24 configurations of T at most once where nothing is drawn, got 48 episodes of 24"
    with pytest.raises(ValueError, match=message):
        check_distinct({0: range(24), 1: range(24, 48)}, 24, "T")
    for seed in (2, 5):  # 24 is configuration 0 again, and 60 is 12
        with pytest.raises(ValueError, match="got 24 episodes of 12"):
            check_distinct(
                {seed - 2: range(12 * seed - 24, 12 * seed - 12), seed: range(12 * seed, 12 * seed + 12)}, 24, "T"
            )
