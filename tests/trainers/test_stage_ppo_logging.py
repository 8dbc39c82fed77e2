"""What is logged of rollouts and updates, and the periodic evaluation with the best checkpoint kept."""

import pytest
import torch
from ppo_toy import PLAN, SpoiledEnv, ToyEnv, logged, make_trainer, make_trajectory

from trl_stare.data import play
from trl_stare.policies import TokenPolicy
from trl_stare.trainers.ppo_batch import decision_rewards
from trl_stare.trainers.stage_ppo_metrics import evaluation_counts, explained_variance, rollout_metrics


def metrics_of(*trajectories, plays_on: bool = False):
    rewards = [decision_rewards(t, PLAN, gamma=1.0, weight=1.0, form="staged") for t in trajectories]
    return rollout_metrics(trajectories, rewards, PLAN, plays_on=plays_on)


def test_one_episode_by_hand():
    """Distance 1, 0.75, 0.5, 0.25, 0 and near below 0.6: two steps are Near, two are Hit; decisions at steps 0, 2 and 3."""
    metrics = metrics_of(make_trajectory([0.0, 0.0, 0.0, 1.0], [0, 2, 3], True))
    expected = {
        "rollout/success_once": [1.0], "rollout/episode_steps": [4.0], "rollout/reward_raw": [1.0],
        "stage/Near/success": [1.0], "stage/Near/steps": [2.0], "stage/Near/return_raw": [0.0],
        "stage/Hit/success": [1.0], "stage/Hit/steps": [2.0], "stage/Hit/return_raw": [1.0],
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == expected
    # with gamma 1 the shaping telescopes: to the last decision it takes Phi up, and at the termination Phi is taken back
    potential = PLAN.potential({"distance": torch.tensor([[1.0], [0.5]]), "success": torch.tensor([False, False])})
    assert metrics["stage/Near/return_shaped"][0] == pytest.approx(float(potential[1] - potential[0]), abs=1e-6)
    assert metrics["stage/Hit/return_shaped"][0] == pytest.approx(1.0 - float(potential[1]), abs=1e-6)
    assert "rollout/success_at_end" not in metrics  # it ended there: what it would have become is not known


def test_success_at_end_is_known_of_episodes_that_play_on():
    solved = torch.tensor([False, True, False])
    signals = {"distance": torch.tensor([[1.0], [0.2], [1.0]]), "success": solved}
    metrics = metrics_of(make_trajectory([1.0, 0.0], [0, 1], False, signals), plays_on=True)
    assert metrics["rollout/success_once"] == [1.0] and metrics["rollout/success_at_end"] == [0.0]
    assert metrics["stage/Hit/steps"] == [0.0]  # near and solved with the same step; what follows belongs to no stage


def test_only_episodes_from_the_beginning_count():
    first = make_trajectory([0.0] * 4, [0, 2], False)
    later = make_trajectory([1.0], [0], True, prefix=torch.zeros(2, 1))
    metrics = metrics_of(first, later)
    assert metrics["rollout/success_once"] == [0.0] and metrics["rollout/reset_success_once"] == [1.0]
    assert metrics["stage/Near/success"] == [1.0] and metrics["stage/Hit/success"] == [0.0]
    assert metrics["rollout/episode_steps"] == [4.0]


def test_counts_of_an_evaluation_by_hand():
    solved, near = make_trajectory([0.0, 1.0], [0, 1], True), make_trajectory([0.0] * 4, [0], False)
    far = make_trajectory(
        [0.0], [0], False, {"distance": torch.ones(2, 1), "success": torch.zeros(2, dtype=torch.bool)}
    )
    expected = {"success_once": (1, 3), "success_at_end": (1, 3), "Near_success": (2, 3), "Hit_success": (1, 2)}
    assert evaluation_counts([solved, near, far], PLAN) == expected
    assert evaluation_counts([], PLAN) == dict.fromkeys(expected, (0, 0))


def test_explained_variance_by_hand():
    returns = torch.tensor([0.0, 2.0])
    for values, expected in (([0.0, 2.0], 1.0), ([1.0, 1.0], 0.0), ([0.0, 1.0], 0.75), ([2.0, 0.0], -3.0)):
        assert explained_variance(torch.tensor(values), returns) == pytest.approx(expected)


def test_everything_is_logged_once_an_iteration(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, logging_steps=1, value_warmup_iterations=0, chunk_size=2)
    trainer.train()
    for name in ("rollout/success_once", "rollout/reward_raw", "rollout/reward_shaped", "value/explained_variance",
                 "stage/Near/success", "stage/Near/steps", "stage/Near/return_raw", "stage/Near/return_shaped"):  # fmt: skip
        assert len(logged(trainer, name)) == 2, name
    assert logged(trainer, "policy/first_ratio") == [pytest.approx(1.0, abs=1e-5)] * 2
    assert len(logged(trainer, "policy/largest_ratio")) == 8  # of every update
    for log in [log for log in trainer.state.log_history if "time/iteration_s" in log]:
        parts = sum(log[f"time/{name}_share"] for name in ("simulate", "render", "policy", "idle"))
        assert parts == pytest.approx(log["time/rollout_share"], abs=0.1)
        assert log["time/rollout_share"] + log["time/update_share"] == pytest.approx(1.0, abs=1e-6)
        assert log["time/steps_per_s"] > 0
    assert len(logged(trainer, "time/iteration_s")) == 2


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    """Iteration 1 is the critic's warm-up, so the first evaluation is that of the initial policy."""
    trainer = make_trainer(
        tmp_path, eval_seeds=list(range(1000, 1040)), num_train_epochs=4, eval_strategy="epoch", save_strategy="best",
        metric_for_best_model="eval_success_once", load_best_model_at_end=True, save_total_limit=1, value_warmup_iterations=1,
    )  # fmt: skip
    trainer.train()
    scores = logged(trainer, "eval_success_once")
    assert len(scores) == 4 and trainer.state.best_metric == max(scores)
    assert len(logged(trainer, "eval_success_at_end")) == 4
    best = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert best == [f"checkpoint-{4 * (1 + scores.index(max(scores)))}"]
    stored = TokenPolicy.from_pretrained(tmp_path / best[0]).model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in trainer.policy.model.state_dict().items())
    assert trainer.evaluate()["eval_success_once"] == max(scores)


def test_evaluation_on_training_starts_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`eval_dataset` must be held out from training, got 2 seeds .* \(e.g. 997\)"
    ):
        make_trainer(tmp_path, eval_seeds=[997, 998, 2000])


def test_evaluation_has_its_own_temperature(tmp_path):
    trainer = make_trainer(tmp_path, eval_seeds=[1000, 1001], eval_temperature=0.0)
    first, again = trainer.evaluate(), trainer.evaluate()
    greedy = play(ToyEnv(), trainer.policy, [1000, 1001], temperature=0.0, generator=None, ignore_terminations=True)
    assert first == again and first["eval_success_once"] == sum(t.success_once for t in greedy) / 2


def test_an_evaluation_goes_on_without_an_episode_that_the_simulator_spoils(tmp_path, caplog):
    trainer = make_trainer(tmp_path, eval_seeds=[1001, 1002, 1003, 1004])
    whole = trainer.evaluate()
    trainer.env = SpoiledEnv(1003, num_envs=8)
    found = trainer.evaluate()
    assert "the episode of seed 1003 is left out, whose state was not finite at step 2" in caplog.text
    assert found.keys() <= whole.keys() and found["eval_success_once"] in (
        0.0,
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        1.0,
    )
