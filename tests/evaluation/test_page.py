"""The page: self-contained, complete, and safe against whatever a policy is called."""

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from trl_stare.evaluation import (
    Evaluation,
    PlayedEpisode,
    build_eval_info,
    distinct_names,
    html_page,
    markdown_page,
    task_metrics,
    write_eval_info,
    write_played,
)
from trl_stare.evaluation.page import failed_in, plot_funnel
from trl_stare.evaluation.records import EpisodeResult
from trl_stare.stages import Segment

TASK, STAGES = "PushCube-v1", ("Reach", "Push")


def png(size=4):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (255, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def episode(seed, passed, *, at_end=None, void=""):
    """`passed`: how many of the two stages were."""
    solved = passed == 2
    segments = tuple(Segment(k, 3 * k, 3 * k + 3, k < passed, 0.1) for k in range(min(passed + 1, 2)))
    result = EpisodeResult(seed, solved, solved if at_end is None else at_end, 9, False, True, segments)
    return PlayedEpisode(TASK, 0, result, void, png())


ROWS = [
    episode(0, 2),
    episode(1, 0),
    episode(2, 1),
    episode(3, 1),
    episode(4, 2, at_end=False),
    episode(5, 0, void="x"),
]


def evaluation(name="<b>bold</b>", rule="success_once", history=(), rows=ROWS, stages=STAGES):
    metrics = task_metrics(rows, dict.fromkeys(stages, "touched"), rule=rule, environment={})
    info = build_eval_info(
        policy={"name": name},
        settings={"success_rule": rule, "temperature": 1.0},
        group="g",
        episodes={TASK: rows},
        metrics={TASK: metrics},
    )
    return Evaluation(name, info, {TASK: rows}, history)


class Reader(HTMLParser):
    """Collects tags and checks that they are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.links, self.cells = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.images.append(attrs)
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        ("success_once", {"Reach": [1], "Push": [2, 3]}),
        ("success_at_end", {"Reach": [1], "Push": [2, 3], "Lost at the end": [4]}),
    ],
)
def test_failures_are_grouped_by_the_stage_they_ended_in(rule, groups):
    found = failed_in(ROWS, STAGES, rule)
    assert {name: [each.result.seed for each in group] for name, group in found.items()} == groups


def test_the_page_needs_nothing_but_itself():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    page = html_page("A & B", [evaluation(history=history), evaluation("other")], most=1)
    reader = Reader()
    reader.feed(page)
    assert not reader.open and "<b>bold" not in page and "A &amp; B" in page and "width=device-width" in page
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    # curves, a funnel, and of both evaluations one failure of each of two stages
    assert len(reader.images) == 2 + 2 * 2
    for image in reader.images:
        assert Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).width >= 4 and image["alt"]
    assert "40.0 % [11.8, 76.9]" in reader.cells and "Push" in reader.cells
    assert "2 failed in Push" in page and page == html_page(
        "A & B", [evaluation(history=history), evaluation("other")], most=1
    )


def test_markdown():
    text = markdown_page("Title", [evaluation("p", rule="success_at_end")])
    assert "| p | PushCube-v1 | 5 | 40.0 % [11.8, 76.9] | 20.0 % [3.6, 62.4] | 1 |" in text
    assert "| Push | p | 4 | 2 | 50.0 % [15.0, 85.0] |" in text
    assert "| p | PushCube-v1 | Lost at the end | 1 |" in text


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["eval/ppo", "eval/dpo/"], ["ppo", "dpo"]),
        (["ppo/eval", "dpo/eval", "sft"], ["ppo/eval", "dpo/eval", "sft"]),
        (["a/x/eval", "b/x/eval", "b/y/eval"], ["a/x/eval", "b/x/eval", "y/eval"]),
        (["/eval", "/a/eval", "/a/eval"], ["/eval", "a/eval", "a/eval"]),
    ],
)
def test_folders_of_one_name_are_told_apart(folders, names):
    assert distinct_names(folders) == names


def test_the_report_tells_them_apart(tmp_path, run_script):
    folders = [tmp_path / name / "eval" for name in ("ppo", "dpo")]
    for folder in folders:
        write_eval_info(folder, evaluation().info)
        write_played(folder / "episodes" / f"{TASK}.parquet", ROWS)
    run_script("recipes/report.py", *folders, "--output_dir", tmp_path)
    assert all(f"| {name}/eval | {TASK} | 5 |" in (tmp_path / "report.md").read_text() for name in ("ppo", "dpo"))


def test_evaluations_of_other_plans_share_a_funnel():
    """The plan of the second has another stage between the two of the first."""
    rows = []
    for row in ROWS:
        parts = [part._replace(stage=2 * part.stage) for part in row.result.segments]
        between = [Segment(1, 3, 3, True, 0.0)] if len(parts) > 1 else []
        parts = (parts[0], *between, *parts[1:])
        rows.append(replace(row, result=replace(row.result, segments=parts)))
    figure = plot_funnel([evaluation("a"), evaluation("b", rows=rows, stages=("Reach", "Grasp", "Push"))], TASK)
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["Reach", "Push", "Grasp"]
    heights = {(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in panel.patches}
    assert {position for position, _ in heights} == {0, 1, 2}
    assert len({height for position, height in heights if position == 1}) == 1  # Push, equal in both


def test_a_folder_of_variations_is_told_from_one_evaluation(tmp_path, run_script):
    (tmp_path / "robustness.json").write_text('{"per_task": {"PushCube-v1": {"camera/shift": {}}}}')
    with pytest.raises(ValueError, match=r"several variations. Give those .*/nominal .*/camera/shift"):
        run_script("recipes/report.py", tmp_path, "--output_dir", tmp_path)


def test_no_evaluation_has_no_page():
    with pytest.raises(ValueError, match="at least one"):
        html_page("none", [])
