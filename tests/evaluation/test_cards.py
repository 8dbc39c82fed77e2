"""Model cards are written without a network and read back as the Hub would."""

import pytest
from huggingface_hub import EvalResult, ModelCard

from trl_stare.evaluation import EpisodeResult, PhaseResult, card_template, publish_results, write_model_card
from trl_stare.stages import Segment


def make_result(**of_phase) -> PhaseResult:
    """Three of four episodes succeed once, two of them at the end."""
    episodes = [
        EpisodeResult(seed, seed < 3, seed < 2, 20, False, True, (Segment(0, 0, 4, seed < 3, 0.5),))
        for seed in range(4)
    ]
    result = PhaseResult.from_episodes(episodes, ("Reach", "Grasp"), temperature=0.6, max_episode_steps=20, wall_s=1.0)
    return result.for_phase(**of_phase) if of_phase else result


def write(folder, **changes) -> ModelCard:
    options = {"phase": "preference", "result": make_result(), "task": "StackCube-v1", "usage": "import trl_stare"}
    path = write_model_card(folder, **(options | changes))
    assert path == folder / "README.md"
    return ModelCard.load(path)


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    data = write(tmp_path).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "robotics", "apache-2.0")
    assert set(data.tags) == {"robotics", "reinforcement-learning", "vision-language-action", "trl", "stare"}
    assert data.model_name == "StackCube-v1-preference"
    once, at_end = data.eval_results
    assert (once.metric_type, once.metric_value, once.dataset_name) == ("success_once", 0.75, "StackCube-v1")
    assert once.metric_name == "success_once, n = 4, 75.0 % [30.1, 95.4]"
    assert (at_end.metric_type, at_end.metric_value) == ("success_at_end", 0.5)


def test_an_adapter_is_told_from_whole_weights(tmp_path):
    assert "merge_checkpoint" not in write(tmp_path, usage=None).text
    (tmp_path / "adapter_config.json").touch()
    text = write(tmp_path, usage=None).text
    assert "TokenPolicy.from_pretrained('path/to/this/folder')" in text and "merge_checkpoint('path/to" in text


def test_the_text_says_n_intervals_stages_seeds_and_use(tmp_path):
    result = make_result(checkpoint="preference", env_steps=12_345, wall_s=342.0)
    text = write(tmp_path, result=result, started_from="out/imitation", visuals="light").text
    for part in (
        "# StackCube-v1-preference",
        "4 episodes with held-out seeds, sampling temperature 0.6, at most 20 steps an episode, light visuals.",
        "| success once | 4 | 75.0 % [30.1, 95.4] |",
        "| Reach | 75.0 % (3 / 4) |",
        "| Grasp | not reached |",
        "Seeds of the episodes: 0-3.",
        "```python\nimport trl_stare\n```",
        "| phase | preference |\n| started from | `out/imitation` |\n| environment steps | 12,345 |\n"
        "| wall-clock time | 5 min 42 s |\n",
        "- trl: ",
    ):
        assert part in text


def test_the_method_names_no_policy_that_it_may_not_have_started_from(tmp_path):
    for started_from in ("outputs/imitation", "user/some-vla"):
        card = write(tmp_path, phase="interaction", started_from=started_from)
        assert "trained with trl-stare: stage-aware PPO (StA-PPO) in the simulator." in card.text
        assert f"| started from | `{started_from}` |" in card.text and "preference policy" not in card.text
    plain = write(tmp_path, phase="interaction", method="PPO in the simulator.")
    assert "trained with trl-stare: PPO in the simulator." in plain.text


def test_a_phase_read_from_results_gives_the_same_card(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert str(write(tmp_path / "a")) == str(write(tmp_path / "b", result=make_result().to_dict()))


def test_no_placeholder_is_left(tmp_path):
    content = str(write(tmp_path, visuals=None, started_from=None))
    assert not any(mark in content for mark in ("{{", "{%", "None"))


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="must be among imitation, preference, interaction and rounds like preference-2, got 'sft'"
    ):
        write(tmp_path, phase="sft")
    with pytest.raises(FileNotFoundError, match="Save the model first"):
        write(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="got 'poem.md'"):
        card_template("poem.md")
    assert not list(tmp_path.iterdir())


def test_results_replace_those_of_their_task_and_metric_and_leave_the_rest(tmp_path):
    def result(task, value):
        return EvalResult(
            task_type="robotics", dataset_type=task, dataset_name=task, metric_type="success_once", metric_value=value
        )

    for results in ([result("A", 0.1), result("B", 0.2)], [result("A", 0.3)]):
        assert publish_results(str(tmp_path), results) == str(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert sorted((each.dataset_type, each.metric_value) for each in card.data.eval_results) == [
        ("A", 0.3),
        ("B", 0.2),
    ]
    assert card.data.model_name == tmp_path.name and f"# {tmp_path.name}" in card.text
    # and the text says the same, once
    assert card.text.count("## Results of") == 1
    assert (
        "| B | success_once 0.2 |" in card.text and "| A | success_once 0.3 |" in card.text and "0.1" not in card.text
    )


def test_results_stand_behind_what_the_training_run_wrote(tmp_path):
    write(tmp_path)
    name = "success_once, n = 300, 71.0 % [65.6, 75.8]"
    found = EvalResult(
        task_type="robotics", dataset_type="StackCube-v1", dataset_name="StackCube-v1", metric_type="success_once",
        metric_name=name, metric_value=0.71,
    )  # fmt: skip
    publish_results(str(tmp_path), [found])
    text = ModelCard.load(tmp_path / "README.md").text
    assert text.index("75.0 % [30.1, 95.4]") < text.index("## Results of") < text.index(f"| StackCube-v1 | {name} |")
    # the other rule's is the training run's, in the metadata as before
    assert "success_at_end, n = 4" in text.partition("## Results of")[2]
