"""The stage-reset curriculum: where episodes begin, that it is a function of seed and state, that it can be resumed."""

import json
from contextlib import closing

import pytest
import torch
from ppo_toy import PLAN, ToyEnv, logged, make_policy, make_trainer, make_trajectory

from trl_stare import get_plan, make_env
from trl_stare.data import demonstrate, play
from trl_stare.envs import get_simulated_task
from trl_stare.interfaces import EpisodeStart
from trl_stare.stages import Stage, StagePlan
from trl_stare.stages.measures import succeeded
from trl_stare.trainers.curriculum import StageCurriculum


def event(name: str) -> Stage:
    return Stage(name=name, done=lambda s: s[name], distance=lambda s: 1.0 - s[name].float(), scale=1.0, reads=(name,))


THREE = StagePlan("toy", (event("a"), event("b"), Stage(name="c", done=succeeded, distance=lambda s: 1.0 - s["success"].float(),
                                                        scale=1.0, reads=("success",))))  # fmt: skip


def episode(a: int | None, b: int | None = None, c: int | None = None, seed: int = 0, steps: int = 8, **fields):
    """Events that fire at these rows and hold from there on; action `t` is `seed + t / 10`."""
    signals = {
        name: torch.arange(steps + 1) >= (steps + 1 if row is None else row)
        for name, row in (("a", a), ("b", b), ("success", c))
    }
    actions = seed + torch.arange(steps)[:, None] / 10
    return make_trajectory([0.0] * steps, [0], c is not None, signals, seed=seed, actions=actions, **fields)


def make(share: float = 0.5, pool_size: int = 4, seed: int = 3) -> StageCurriculum:
    return StageCurriculum(THREE, share=share, pool_size=pool_size, seed=seed, max_episode_steps=8)


def play_once(curriculum: StageCurriculum, *trajectories) -> None:
    curriculum.update([curriculum.describe(t) for t in trajectories])


# events of the episodes -> the stage that is passed most rarely of those that were entered
TARGETS = [
    ([], None),
    ([(None, None, None)], None),  # no stage was entered but the first
    ([(2, None, None), (3, 4, 5)], 1),  # b: 1 of 2, c: 1 of 1
    ([(2, 4, None), (3, 4, None), (3, None, None)], 2),  # b: 2 of 3, c: 0 of 2
    ([(1, 2, 3), (1, 2, 3)], 1),  # all passed: the first of them
]


@pytest.mark.parametrize(("episodes", "target"), TARGETS)
def test_the_stage_that_fails_most_is_chosen(episodes, target):
    curriculum = make()
    play_once(curriculum, *(episode(*rows) for rows in episodes))
    assert curriculum.target == target


def test_a_beginning_is_the_seed_and_the_actions_up_to_the_entry():
    curriculum = make(share=1.0)
    play_once(curriculum, episode(2, 5, seed=7))
    assert curriculum.target == 2
    for start in curriculum.starts([1, 2], iteration=0):
        assert start.seed == 7
        torch.testing.assert_close(start.actions[:, 0], 7 + torch.arange(5) / 10)


def test_an_episode_that_began_later_passes_its_prefix_on():
    curriculum = make(share=1.0)
    before = torch.tensor([[9.0], [9.5]])
    play_once(curriculum, episode(0, 3, seed=7, prefix=before))
    (start,) = curriculum.starts([1], iteration=0)
    assert start.actions[:, 0].tolist() == pytest.approx([9.0, 9.5, 7.0, 7.1, 7.2])
    assert curriculum.counts == [[0.0, 0.0]] * 3  # P is of episodes from the beginning only


def test_entries_with_too_little_time_left_are_no_beginnings():
    """At most three quarters of 8 steps, those before the first look included."""
    curriculum = make()
    play_once(curriculum, episode(7), episode(5, prefix=torch.zeros(2, 1)))
    assert curriculum.target is None
    play_once(curriculum, episode(6))
    assert curriculum.target == 1


def test_a_share_of_the_starts_is_replaced_and_nothing_else():
    curriculum = make(share=0.25)
    play_once(curriculum, episode(2, seed=7), episode(3, seed=8))
    starts = curriculum.starts(range(100, 140), iteration=5)
    replaced = [i for i, start in enumerate(starts) if isinstance(start, EpisodeStart)]
    assert len(replaced) == 10 and {starts[i].seed for i in replaced} == {7, 8}
    assert all(start == 100 + i for i, start in enumerate(starts) if i not in replaced)


def test_the_pool_keeps_the_newest_and_old_counts_fade():
    curriculum = make(pool_size=2)
    play_once(curriculum, *(episode(2, seed=seed) for seed in range(5)))
    assert [seed for seed, _ in curriculum.pools[1]] == [3, 4]
    assert curriculum.counts == [[5.0, 5.0], [0.0, 5.0], [0.0, 0.0]]
    play_once(curriculum, episode(1, 2))
    assert curriculum.counts == [[3.5, 3.5], [1.0, 3.5], [0.0, 1.0]]


def test_starts_are_a_function_of_seed_iteration_and_state():
    first, second = make(), make()
    for trajectory in (episode(2, 4, seed=7), episode(3, seed=8)):
        play_once(first, trajectory)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()

    def plain(starts):
        return [(s.seed, s.actions.tolist()) if isinstance(s, EpisodeStart) else s for s in starts]

    drawn = [plain(first.starts(range(20), iteration)) for iteration in (0, 1)]
    assert drawn == [plain(second.starts(range(20), iteration)) for iteration in (0, 1)] and drawn[0] != drawn[1]
    other = make(seed=4)
    other.load_state_dict(first.state_dict())
    assert plain(other.starts(range(20), 0)) != drawn[0]
    with pytest.raises(ValueError, match="`state` must be of 3 stages, got 2"):
        first.load_state_dict({"counts": [[0, 0]] * 2, "pools": [[], []]})


def test_demonstrations_can_be_begun_from():
    curriculum = make()
    curriculum.add([episode(1, 3, 5, seed=7)])
    assert curriculum.target == 1 and len(curriculum.pools[2]) == 1  # nothing was played: no stage was ever passed


def test_switched_off_it_keeps_nothing():
    curriculum = make(share=0.0)
    play_once(curriculum, episode(2, 4))
    assert curriculum.starts(range(3), 0) == [0, 1, 2] and curriculum.state_dict() == make().state_dict()


def test_replaying_a_beginning_leads_to_the_entry_of_the_stage():
    policy, env = make_policy(), ToyEnv()
    shown = play(env, policy, range(40), temperature=1.0, generator=torch.Generator().manual_seed(0))
    curriculum = StageCurriculum(PLAN, share=1.0, pool_size=99, seed=0, max_episode_steps=6)
    play_once(curriculum, *shown)
    starts = curriculum.starts(range(20), iteration=0)
    again = play(env, policy, starts, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert {int(PLAN.current_stage(t.signals)[0]) for t in again} == {1}
    assert all(len(t.prefix) + t.num_steps <= 6 for t in again)


def test_training_with_it_resumes_exactly(tmp_path):
    options = {"reset_share": 0.5, "num_train_epochs": 3, "save_strategy": "epoch"}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    state = whole.curriculum.state_dict()
    assert len(state["pools"][1]) > 0 and logged(whole, "rollout/reset_success_once")
    rows = [json.loads(line) for line in whole.ledger.path.read_text().splitlines()]
    begun = [row for row in rows if row["prefix_steps"]]
    assert len(begun) == 16 and {row["start_stage"] for row in begun} == {
        "Hit"
    }  # half of the second and third rollout
    assert all(row["prefix_steps"] + row["length"] <= 6 for row in begun)
    assert sum(row["length"] for row in rows) == whole.env_steps
    resumed = make_trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert resumed.curriculum.state_dict() == state
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_in_the_simulator_beginnings_lie_at_the_entry_of_their_stage():
    """Two demonstrations of StackCube-v1, begun anew at each of their later stages."""
    plan = get_plan("StackCube-v1")
    with closing(make_env("StackCube-v1", 2, num_workers=1, chunk_size=1, image_size=32)) as env:
        shown = demonstrate(env, get_simulated_task("StackCube-v1").demonstrate, [100_000, 100_001])
        curriculum = StageCurriculum(plan, share=1.0, pool_size=2, seed=0, max_episode_steps=env.max_episode_steps)
        curriculum.add(shown)
        for stage in (1, 2, 3):
            curriculum.counts = [[1.0, 1.0] if k != stage else [0.0, 1.0] for k in range(len(plan))]
            assert curriculum.target == stage
            signals = env.reset(curriculum.starts(range(2), iteration=0)).signals
            assert plan.current_stage(signals).tolist() == [stage] * 2
