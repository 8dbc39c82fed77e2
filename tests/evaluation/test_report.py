"""The report of a made-up but complete run, read back; and runs that are not complete."""

import json

import pytest
from PIL import Image

from trl_stare.evaluation import (
    EpisodeResult,
    PhaseResult,
    build_results,
    package_versions,
    plot_report,
    read_results,
    write_report,
    write_results,
)
from trl_stare.evaluation.plots import _all_rounds
from trl_stare.evaluation.report import format_seconds, format_seeds, markdown_table
from trl_stare.stages import Segment

STAGES = ("Reach", "Grasp")
# which of ten episodes each phase solves: preference wins 1; interaction wins 7 and loses 1
SOLVED = {"imitation": {0, 1}, "preference": {0, 1, 2}, "interaction": {1, 2, 3, 4, 5, 6, 7, 8}}
HISTORIES = {
    "imitation": [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 20, "train_runtime": 3.0}],
    "preference": [
        {"step": 5, "loss": 0.69, "rewards/accuracies": 0.5},
        {"step": 9, "loss": 0.5, "rewards/accuracies": 0.8},
    ],
    "interaction": [{"step": 1, "rollout/env_steps": 800.0, "rollout/success_once": 0.4}],
}


def make_episodes(phase: str, first_seed: int = 0) -> list[EpisodeResult]:
    episodes = []
    for seed in range(10):
        solved = seed in SOLVED[phase]
        segments = (Segment(0, 0, 4, True, 0.5), Segment(1, 4, 8, solved, 0.25))
        episodes.append(EpisodeResult(first_seed + seed, solved, solved, 20, False, True, segments))
    return episodes


EPISODES = {phase: make_episodes(phase) for phase in SOLVED}


def make_results(*phases: str) -> dict:
    summaries = {
        phase: PhaseResult.from_episodes(
            EPISODES[phase], STAGES, temperature=0.6, max_episode_steps=20, wall_s=1.0
        ).for_phase(checkpoint=phase, env_steps=12_000, wall_s=342.0)
        for phase in phases
    }
    return build_results(task="StackCube-v1", seed=3, visuals="light", phases=summaries)


def table(report: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its rule."""
    lines = report.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not row[0].startswith(":-")]


def test_results_follow_the_schema_in_the_order_of_the_run(tmp_path):
    results = make_results("interaction", "imitation", "preference")
    path = tmp_path / "results.json"
    write_results(path, results)
    assert read_results(path) == json.loads(path.read_text()) == results
    assert list(results) == ["task", "seed", "versions", "visuals", "phases"]
    assert list(results["phases"]) == ["imitation", "preference", "interaction"]
    assert '"eval_seeds": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],' in path.read_text()
    # a phase as read from the file goes in again
    assert build_results(task="StackCube-v1", seed=3, visuals="light", phases=results["phases"]) == results


def test_results_that_lack_a_field_do_not_replace_the_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, make_results("imitation"))
    before = path.read_text()
    for field, message in (("visuals", "visuals is missing"), ("phases", "phases is missing")):
        results = make_results("imitation")
        del results[field]
        with pytest.raises(ValueError, match=message):
            write_results(path, results)
    results = make_results("imitation")
    del results["phases"]["imitation"]["eval_seeds"]
    with pytest.raises(ValueError, match="eval_seeds is missing"):
        write_results(path, results)
    results["phases"] = {"pretraining": {}}
    with pytest.raises(
        ValueError,
        match="must be among imitation, preference, interaction and rounds like preference-2, got 'pretraining'",
    ):
        write_results(path, results)
    assert path.read_text() == before


def test_the_report_says_what_was_measured(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "interaction_failure_seed7.mp4").write_bytes(b"")
    path = write_report(
        tmp_path,
        make_results(*SOLVED),
        HISTORIES,
        episodes=EPISODES,
        pair_yields={"preference": {"Reach": {"made": 4, "both_failed": 0}, "Grasp": {"made": 9, "both_failed": 2}}},
        timing={"imitation": 240.0, "interaction": 800.0},
        notes=["Command: `make ipi`."],
    )
    report = path.read_text()
    success = table(report, "Success on held-out seeds")
    assert success[1][:4] == ["imitation", "10", "20.0 % [5.7, 51.0]", "20.0 % [5.7, 51.0]"]
    assert success[3][2] == "80.0 % [49.0, 94.3]" and success[3][4:] == ["0.6", "12,000", "5 min 42 s"]
    # p of 1 against 0 is 1; of 7 against 1 it is 2 * (1 + 8) / 2**8
    assert table(report, "Compared in pairs")[1:] == [
        ["preference against imitation", "+10.0 points", "1", "0", "1"],
        ["interaction against imitation", "+60.0 points", "7", "1", "0.07"],
    ]
    assert table(report, "Stages")[1:] == [
        ["Reach", "100.0 % (10 / 10)", "100.0 % (10 / 10)", "100.0 % (10 / 10)"],
        ["Grasp", "20.0 % (2 / 10)", "30.0 % (3 / 10)", "80.0 % (8 / 10)"],
    ]
    assert table(report, "Preference pairs")[:2] == [["stage", "made", "both failed"], ["Reach", "4", "0"]]
    assert table(report, "Time")[-1] == ["total", "17 min 20 s"]
    for part in ("(videos/interaction_failure_seed7.mp4)", "(report.png)", "seeds 0-9", "seed of the run: 3",
                 "visuals: light", "- Command: `make ipi`.", f"trl {package_versions()['trl']}"):  # fmt: skip
        assert part in report


def test_a_run_that_only_imitated_has_a_report(tmp_path):
    report = write_report(tmp_path, make_results("imitation"), {}, episodes={}).read_text()
    assert table(report, "Compared in pairs")[1][1] == "not evaluated: imitation, preference"
    assert "## Videos" not in report and "## Preference pairs" not in report


def test_rounds_are_reported_each(tmp_path):
    """Two rounds of preference: a column, a row and a table of pairs each, and one learning curve through both."""
    names = {
        "interaction": "interaction",
        "preference-2": "interaction",
        "preference": "preference",
        "imitation": "imitation",
    }
    one = make_results(*SOLVED)["phases"]
    phases = {name: one[of] for name, of in names.items()}
    results = build_results(task="StackCube-v1", seed=3, visuals="light", phases=phases)
    assert list(results["phases"]) == ["imitation", "preference", "preference-2", "interaction"]
    report = write_report(
        tmp_path,
        results,
        {name: HISTORIES[name] for name in SOLVED} | {"preference-2": HISTORIES["preference"]},
        episodes={name: EPISODES[of] for name, of in names.items()},
        pair_yields={"preference": {"Reach": {"made": 4}}, "preference-2": {"Reach": {"made": 6}}},
    ).read_text()
    assert report.startswith("# StackCube-v1: imitation, preference, interaction\n")
    assert [row[0] for row in table(report, "Success on held-out seeds")[1:]] == list(results["phases"])
    assert [row[:2] for row in table(report, "Compared in pairs")[1:]] == [
        ["preference against imitation", "+10.0 points"],
        ["preference-2 against imitation", "+60.0 points"],
        ["interaction against imitation", "+60.0 points"],
    ]
    assert table(report, "Preference pairs per stage, preference-2")[1] == ["Reach", "6"]
    assert _all_rounds("preference", {"preference-2": HISTORIES["preference"], **HISTORIES}) == [
        {"step": 5, "loss": 0.69, "rewards/accuracies": 0.5},
        {"step": 9, "loss": 0.5, "rewards/accuracies": 0.8},
        {"step": 14, "loss": 0.69, "rewards/accuracies": 0.5},
        {"step": 18, "loss": 0.5, "rewards/accuracies": 0.8},
    ]


def test_phases_on_other_seeds_are_not_compared(tmp_path):
    episodes = EPISODES | {"interaction": make_episodes("interaction", first_seed=5)}
    report = write_report(tmp_path, make_results(*SOLVED), HISTORIES, episodes=episodes).read_text()
    what, difference = table(report, "Compared in pairs")[2][1:3]
    assert (
        what.startswith("not comparable: ") and "that only one of them played (e.g. 0)" in what and difference == "-"
    )


@pytest.mark.parametrize("phases", [("imitation",), ("imitation", "interaction"), tuple(SOLVED)])
@pytest.mark.parametrize("histories", [{}, HISTORIES, {"interaction": [{"step": 1, "loss": 0.1}]}])
def test_the_picture_is_drawn_from_whatever_there_is(tmp_path, phases, histories):
    plot_report(make_results(*phases), histories, tmp_path / "new" / "report.png")
    with Image.open(tmp_path / "new" / "report.png") as picture:
        assert picture.size == (910, 1430)
        assert picture.convert("L").getextrema() == (0, 255)


@pytest.mark.parametrize(("phases", "message"), [({}, "at least one phase"), ({"sft": {}}, "got 'sft'")])
def test_a_picture_of_nothing_is_refused(tmp_path, phases, message):
    with pytest.raises(ValueError, match=message):
        plot_report({"task": "StackCube-v1", "phases": phases}, {}, tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (59.6, "1 min 00 s"), (342, "5 min 42 s"), (7320, "2 h 02 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("seeds", "text"), [([], ""), ([5], "5"), ([3, 1, 2, 7], "1-3, 7"), (range(300), "0-299")])
def test_seeds_as_ranges(seeds, text):
    assert format_seeds(seeds) == text


def test_markdown_tables():
    assert markdown_table(("a", "b"), [("x", 1)]) == "| a | b |\n| :--- | ---: |\n| x | 1 |"


def test_versions_name_what_decides_a_result():
    versions = package_versions()
    assert list(versions) == ["python", "trl_stare", "trl", "transformers", "accelerate", "peft", "datasets", "torch",
                              "mani_skill", "sapien", "numpy"]  # fmt: skip
    assert versions["python"].startswith("3.") and versions["torch"].startswith("2.")
