"""All queues' results together: which comparisons count, what the table and the figure say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.summary import findings, over_starts, page, plot, table  # noqa: E402

EVIDENCE = ROOT / "docs" / "evidence"


def arm(name, method, **ppo):
    return {"name": name, "method": method, "start": "weak", "ppo": ppo}


def results(*differences, weights="abc", a="ppo", b="sta-ppo", task="PushCube-v1", start=0.5, first_seed=0):
    """A queue's results with one comparison, of as many training seeds as there are differences."""
    arms = [
        arm("ppo", "ppo"),
        arm("norm", "ppo", advantage_norm="stage"),
        arm("sta-ppo", "sta-ppo"),
        arm("sum", "tpo-sum"),
        arm("sta-sum", "sta-tpo-sum"),
    ]
    return {
        "queue": {"task": task, "arms": arms, "temperature": 1.0},
        "checkpoints": {"weak": {"files": {"model.safetensors": weights}}},
        "starts": {"weak": {"success_once": start}},
        "comparisons": [
            {
                "a": a,
                "b": b,
                "p_value": 0.25,
                "per_seed": {
                    str(k): {"difference": d, "b_only": 50 + round(300 * d), "a_only": 50}
                    for k, d in enumerate(differences, first_seed)
                },
            }
        ],
    }


@pytest.mark.parametrize(
    ("a", "b", "phase"),
    [
        ("ppo", "sta-ppo", "interaction"),
        ("ppo", "norm", "interaction"),
        ("sum", "sta-sum", "preference"),
        ("norm", "sta-ppo", None),  # both know stages
        ("sta-ppo", "ppo", None),
        ("sum", "sta-ppo", None),  # another phase
        ("weak", "sta-ppo", None),  # against the start
    ],
)
def test_what_is_stages_against_none(a, b, phase):
    (found,) = findings({"queue": results(0.1, a=a, b=b)})
    assert (found.phase, found.a["name"], found.b["name"]) == (phase, a, b)


def test_runs_that_queues_share_count_once_where_most_are():
    found = findings(
        {
            "two": results(0.1, -0.1),
            "four": results(0.1, -0.1, 0.1, 0.3),
            "some of the four": results(-0.1, 0.1, first_seed=1),
            "another": results(0.1, weights="xyz", start=0.25),
            "none": {"per_task": []},
        }
    )
    assert [(one.file, one.start, len(one.differences)) for one in found] == [("another", 0.25, 1), ("four", 0.5, 4)]


def test_other_runs_of_the_same_methods_are_not_taken_for_the_same():
    """Only the first training seed came out alike, by chance."""
    found = findings({"one": results(0.0, -0.1), "other": results(0.0, 0.1, 0.2)})
    assert [one.file for one in found] == ["one", "other"]


def test_checkpoints_in_shards_are_told_apart_by_all_their_weights():
    queues = {name: results(0.1) for name in ("one", "same", "another")}
    for name, content in queues.items():
        last = "y" if name == "another" else "x"
        files = {"model-1-of-2.safetensors": "abc", "model-2-of-2.safetensors": last, "training_args.bin": name}
        content["checkpoints"]["weak"]["files"] = files
    assert [one.file for one in findings(queues)] == ["another", "one"]


def test_the_table_has_the_mean_over_training_seeds():
    # 12.0 and -1.3 points: as `mean_difference` has it
    text = table(findings({"queue": results(0.12, -0.013), "single": results(0.1, task="PullCube-v1")}))
    assert "| 50.0 | ppo -> sta-ppo, PushCube-v1, `queue` | +12.0, -1.3 | +5.3 [-79.1, +89.8] | 0.25 |" in text
    assert "PullCube-v1" not in text


def test_over_starts_each_counts_once_and_three_are_needed():
    # 5.5, 1.0 and 3.0 points: mean 3.17, standard deviation 2.25, Student's 4.303 * 2.25 / sqrt(3) = 5.60
    three = {
        "both seeds": results(0.12, -0.01, weights="a"),
        "one": results(0.01, weights="b"),
        "another": results(0.03, weights="c", start=0.05),
    }
    rare = {"rare": results(0.5, weights="d", start=0.049), "norm": results(0.5, weights="e", b="norm")}
    against_none = {"against the start": results(0.5, weights="f", a="weak")}
    text = over_starts(findings(three | rare | against_none))
    assert text.splitlines()[2:] == ["| 5 % or more | ppo -> sta-ppo | 3 | 4 | +3.2 [-2.4, +8.8] | 3 |"]


def test_the_page_in_docs_is_of_the_results_that_are_there():
    content = {file.stem: json.loads(file.read_text()) for file in EVIDENCE.glob("*.json")}
    assert (ROOT / "docs" / "comparisons.md").read_text() == page(findings(content), "comparisons.png"), (
        "run `python -m benchmarks.evidence.summary docs/evidence/*.json`"
    )


def test_more_tasks_than_colours_have_a_figure(tmp_path):
    plot(tmp_path / "found.png", findings({f"{k}": results(0.1, task=f"Task{k}-v1") for k in range(8)}))
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_writes_page_and_figure(run_script, tmp_path):
    (tmp_path / "queue.json").write_text(json.dumps(results(0.1, 0.2, 0.4)))
    run_script("benchmarks/evidence/summary.py", tmp_path / "queue.json", "--output", tmp_path / "new" / "found")
    assert "+10.0, +20.0, +40.0" in (tmp_path / "new" / "found.md").read_text()
    assert (tmp_path / "new" / "found.png").read_bytes()[:4] == b"\x89PNG"
