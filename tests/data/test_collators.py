"""From pairs to rows to a flat batch, with numbers that say where they came from."""

from dataclasses import replace

import pytest
import torch

from trl_stare.data.collators import PreferenceCollator, check_traces, pairs_dataset
from trl_stare.data.pairs import StagePair
from trl_stare.data.trajectory import Trajectory


def episode(number: int, num_decisions: int, seed: int = 7) -> Trajectory:
    """Decision `m` of episode `number` has pixels, state and trace of value `10 * number + m`; two steps a
    decision."""
    values, steps = 10 * number + torch.arange(num_decisions), 2 * num_decisions
    return Trajectory(
        task="Toy-v1",
        instruction=f"do {seed}",
        seed=seed,
        policy="toy",
        images=values.to(torch.uint8)[:, None, None, None].expand(-1, 4, 5, 3),
        state=values.float()[:, None].expand(-1, 2),
        starts=torch.arange(0, steps, 2),
        actions=torch.zeros(steps, 1),
        labels=torch.zeros(steps, 1),
        trace=values[:, None].expand(-1, 4),
        logps=None,
        features=None,
        final_image=torch.zeros(4, 5, 3, dtype=torch.uint8),
        final_state=torch.zeros(2),
        signals={"success": torch.zeros(steps + 1, dtype=torch.bool)},
        reward=torch.zeros(steps),
        terminated=False,
        truncated=True,
    )


EPISODES = [episode(0, 4), episode(1, 3), episode(2, 2, seed=8), episode(3, 1, seed=8)]
PAIRS = [
    StagePair("Toy-v1", "do 7", 7, 1, "Grasp", 0, 1, 2, 7, 4, 6, 0.5, 1.0, "passed"),
    StagePair("Toy-v1", "do 8", 8, 0, "Reach", 3, 2, 0, 2, 0, 4, 0.25, 0.75, "cost"),
]


def prepare(obs):
    """The observations themselves, so that the test sees what a policy would."""
    return {"pixels": obs.images, "state": obs.state, "words": torch.tensor([len(text) for text in obs.instructions])}


def test_a_row_holds_the_decisions_of_its_slices():
    rows = pairs_dataset(EPISODES, PAIRS)
    assert rows["chosen_trace"] == [[[1] * 4, [2] * 4, [3] * 4], [[30] * 4]]
    assert rows["rejected_trace"] == [[[12] * 4], [[20] * 4, [21] * 4]]
    assert rows["stage_name"] == ["Grasp", "Reach"]
    assert rows[1]["rejected_frames"][1].getpixel((0, 0)) == (21, 21, 21)
    assert not {"image", "images"} & set(rows.column_names)


def test_a_pair_across_starts_has_the_decisions_of_both():
    """Its seed is the chosen side's; nothing else of the rejected side may be another's."""
    episodes = [EPISODES[0], replace(EPISODES[2], instruction="do 7")]
    pair = replace(PAIRS[0], rejected=1, rejected_start=0, rejected_stop=2, reason="across")
    rows = pairs_dataset(episodes, [pair])
    assert rows["seed"] == [7] and rows["chosen_trace"] == [[[1] * 4, [2] * 4, [3] * 4]]
    assert rows["rejected_trace"] == [[[20] * 4]]
    for wrong, trajectories in (
        (replace(pair, reason="passed"), episodes),
        (pair, [EPISODES[0], EPISODES[2]]),
        (replace(pair, seed=8), episodes),
    ):
        with pytest.raises(ValueError, match="must be of .* for pair 0"):
            pairs_dataset(trajectories, [wrong])


def test_the_batch_is_flat_chosen_first():
    batch = PreferenceCollator(prepare, 2)(list(pairs_dataset(EPISODES, PAIRS)))
    order = [1, 2, 3, 30, 12, 20, 21]
    assert next(iter(batch)) == "stages"
    assert batch["stages"].tolist() == [1, 0]
    assert batch["stage_names"] == ["Grasp", "Reach"]
    assert batch["chosen_cost"].tolist() == [0.5, 0.25]
    assert batch["rejected_cost"].tolist() == [1.0, 0.75]
    assert batch["side_ids"].tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch["trace"][:, 0].tolist() == order
    # two tokens a step; the first pair's chosen segment ends within a chunk
    both, first = [True] * 4, [True, True, False, False]
    assert batch["mask"].tolist() == [both, both, first, both, both, both, both]
    assert batch["inputs"]["pixels"].dtype == torch.uint8
    assert batch["inputs"]["pixels"].shape == (7, 4, 5, 3)
    assert batch["inputs"]["pixels"][:, 0, 0, 0].tolist() == order
    assert batch["inputs"]["state"][:, 1].tolist() == order
    assert "ref_chosen_logps" not in batch


def test_reference_scores_are_taken_along():
    rows = pairs_dataset(EPISODES, PAIRS).add_column("ref_chosen_logps", [-1.0, -2.0])
    assert PreferenceCollator(prepare, 2)(list(rows))["ref_chosen_logps"].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("episodes", "pair", "message"),
    [
        (EPISODES, replace(PAIRS[0], chosen=9), "refer to the 4 trajectories, got 9 in pair 0"),
        (EPISODES, replace(PAIRS[0], seed=1), "must be of"),
        (EPISODES, replace(PAIRS[0], rejected=2), "must be of"),
        (EPISODES, replace(PAIRS[0], chosen_start=3, chosen_stop=3), "none on the chosen side of pair 0"),
        ([replace(EPISODES[0], trace=None), EPISODES[1]], PAIRS[0], "must have a trace"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(episodes, pair, message):
    with pytest.raises(ValueError, match=message):
        pairs_dataset(episodes, [pair])


class Halves:
    """A policy whose bin `b` is the action `b / 2`, with one action dimension and three steps a chunk."""

    chunk_size, action_dim = 3, 1

    def encode(self, actions):
        return (2 * actions).long().flatten(1)

    def decode(self, trace):
        return trace[..., None] / 2


def rollout(number: int) -> Trajectory:
    """Two decisions of three steps, of which the episode's end cut off the last."""
    trace = torch.tensor([[1, 2, 3], [4, 5, 6]]) + number
    actions = trace.flatten()[:5, None] / 2
    return replace(EPISODES[2], starts=torch.tensor([0, 3]), trace=trace, actions=actions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"trace": None}, r"`trajectories\[1\]` must have a trace, got None"),
        (
            {"trace": torch.zeros(2, 3, dtype=torch.int64)},
            r"`trajectories\[1\]` must be a rollout of a policy with the same",
        ),
        ({"trace": torch.zeros(2, 4, dtype=torch.int64)}, r"got traces \[2, 4\] of 'toy' that decode to others"),
        ({"starts": torch.tensor([0, 1])}, "same actions"),
        ({"actions": torch.zeros(5, 2)}, "same actions"),
    ],
)
def test_traces_are_what_was_executed(change, message):
    trajectories = [rollout(0), replace(rollout(1), **change)]
    if message is None:
        return check_traces(trajectories, Halves())
    with pytest.raises(ValueError, match=message):
        check_traces(trajectories, Halves())
    check_traces(trajectories, Halves(), episodes=1)


def test_a_chunk_is_divided_among_the_stages_it_acts_in():
    """Seven steps of an episode that ended within its last chunk: every step is in one segment, and none that was not taken."""
    long = replace(EPISODES[0], actions=torch.zeros(7, 1))
    cuts = [(0, 3), (3, 4), (4, 7)]
    pairs = [replace(PAIRS[0], chosen_start=start, chosen_stop=stop) for start, stop in cuts]
    rows = pairs_dataset([long, EPISODES[1]], pairs)
    assert rows["chosen_taken"] == [[[0, 2], [0, 1]], [[1, 2]], [[0, 2], [0, 1]]]
    assert PreferenceCollator(prepare, 2)(list(rows))["mask"][:5].sum() == 2 * 7
