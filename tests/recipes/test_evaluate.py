"""`evaluate.py` and `compare.py` with a checkpoint on the real simulator: once as a user runs them, else in this process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from trl_stare.evaluation import file_digests, played_variations, read_played
from trl_stare.policies import TokenPolicy, create_tiny_pi0

QUANTILES = {"q01": [-0.1] * 7, "q99": [0.1] * 7}
ROOT = Path(__file__).parents[2]
TASK = "PushCube-v1"
EXPERT = ["--model", "expert", "--task", TASK, "--episodes", 1, "--num_envs", 1]


def launch(recipe: str, *args: object) -> subprocess.CompletedProcess:
    """In a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, f"recipes/{recipe}.py", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    stats = {
        "action": {"scale": [0.7, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]},
        "state": {"mean": [0.0] * 8, "std": [1.0] * 8},
    }
    folder = tmp_path_factory.mktemp("model")
    TokenPolicy.create_tiny({TASK: stats}, image_size=16, chunk_size=5).save_pretrained(str(folder))
    return folder


def test_the_same_command_gives_the_same_bytes_and_no_difference(checkpoint, tmp_path, run_script):
    flags = ["--model", checkpoint, "--task", TASK, "--episodes", 2, "--seed", 3, 1, "--num_envs", 2]
    flags += ["--num_workers", 1, "--videos", 0]
    digests = file_digests(checkpoint)
    done = launch("evaluate", *flags, "--output_dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr[-2000:]
    run_script("recipes/evaluate.py", *flags, "--push", "true", "--output_dir", tmp_path / "b")
    for file in ("eval_info.json", "eval_info.md", f"episodes/{TASK}.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    info = json.loads((tmp_path / "a" / "eval_info.json").read_text())
    assert info["policy"] == {"name": str(checkpoint), "revision": None, "files": digests}
    assert "model.safetensors" in digests and file_digests(checkpoint) == digests, "the card does not count"
    metrics = info["per_task"][0]["metrics"]
    assert metrics["eval_seeds"] == {"3": "6-7", "1": "2-3"} and metrics["n_episodes"] == 4
    assert metrics["environment"]["sim_backend"] == "physx_cpu" and info["settings"]["temperature"] == 1.0
    rows = read_played(tmp_path / "a" / "episodes" / f"{TASK}.parquet")
    assert [row.result.seed for row in rows] == [6, 7, 2, 3] and rows[0].final_image.startswith(b"\x89PNG")
    results = ModelCard.load(checkpoint / "README.md").data.eval_results
    assert [(r.dataset_type, r.metric_type) for r in results] == [(TASK, "success_once"), (TASK, "success_at_end")]

    run_script("recipes/compare.py", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab.md")
    assert "not distinguishable at n = 4, and no difference was seen" in (tmp_path / "ab.md").read_text()

    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(
        ValueError, match=f"`--with` must give training runs that differ, got the weights of {b} and {a} twice"
    ):
        run_script("recipes/compare.py", a, b, "--with", b, a)
    info["policy"]["files"]["model.safetensors"] = "of another run"
    (b / "eval_info.json").write_text(json.dumps(info))
    run_script("recipes/compare.py", a, b, "--with", b, a, "--output", tmp_path / "runs.md")
    written = (tmp_path / "runs.md").read_text()
    assert f"- A: {checkpoint} ({b})" in written and "not distinguishable over 2 training runs" in written

    for folder in (a, b):  # a training run may have starts of its own, on which both methods are evaluated
        other = shutil.copytree(folder, tmp_path / f"{folder.name}2")
        info = json.loads((other / "eval_info.json").read_text())
        info["policy"]["files"]["model.safetensors"] += " and of another seed"
        info["per_task"][0]["metrics"]["eval_seeds"] = {"0": "0-3"}
        (other / "eval_info.json").write_text(json.dumps(info))
    run_script(
        "recipes/compare.py", a, tmp_path / "a2", "--with", b, tmp_path / "b2", "--output", tmp_path / "runs.md"
    )
    assert "allowed to differ" not in (tmp_path / "runs.md").read_text()
    with pytest.raises(ValueError, match="got other seeds: .*0-3"):
        run_script("recipes/compare.py", a, tmp_path / "a2", "--with", b, b)


def test_a_flow_policy_of_several_robots_is_evaluated_as_any_other(tmp_path, run_script):
    policy = create_tiny_pi0({TASK: {"action": QUANTILES}}, chunk_size=10, num_inference_steps=2)
    policy.model.config.norm_stats["another"] = {"action": QUANTILES}
    policy.save_pretrained(tmp_path / "pi0")
    flags = ["--model", tmp_path / "pi0", "--task", TASK, "--episodes", 2, "--num_envs", 2, "--num_workers", 1]
    flags += ["--videos", 0, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="unnorm_key.*another"):
        run_script("recipes/evaluate.py", *flags)
    run_script("recipes/evaluate.py", *flags, "--policy.unnorm_key", TASK)
    info = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    metrics = info["per_task"][0]["metrics"]
    assert metrics["n_episodes"] == 2 and metrics["environment"]["image_shape"] == [28, 28]
    assert info["settings"]["policy"] == {"unnorm_key": TASK}

    with pytest.raises(ValueError, match=r"has other \['policy'\]"):
        run_script("recipes/evaluate.py", *flags, "--policy.unnorm_key", "another")
    shutil.copytree(tmp_path / "pi0", tmp_path / "moved")
    flags[1] = tmp_path / "moved"  # the same weights
    run_script("recipes/evaluate.py", *flags, "--policy.unnorm_key", TASK)
    policy.model.config.unused = 1
    policy.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"has other \['weights'\]"):
        run_script("recipes/evaluate.py", *flags, "--policy.unnorm_key", TASK)


def test_chance_does_not_continue_the_demonstrators_evaluation(tmp_path, run_script):
    flags = [*EXPERT, "--videos", 0, "--output_dir", tmp_path]
    run_script("recipes/evaluate.py", *flags)
    flags[1] = "random"
    with pytest.raises(ValueError, match=r"has other \['model'\]"):
        run_script("recipes/evaluate.py", *flags)


def test_a_video_that_was_cut_off_is_filmed_again_and_not_published(tmp_path, run_script):
    videos = tmp_path / "videos" / TASK
    videos.mkdir(parents=True)
    (videos / ".partial-expert_success_seed0.mp4").write_bytes(b"cut off")
    # another policy's, whose name has the outcome in it
    (videos / "a_success_expert_failure_seed7.mp4").write_bytes(b"")
    run_script("recipes/evaluate.py", *EXPERT, "--output_dir", tmp_path)
    metrics = json.loads((tmp_path / "eval_info.json").read_text())["per_task"][0]["metrics"]
    assert [Path(path).name for path in metrics["video_paths"]] == [
        "a_success_expert_failure_seed7.mp4",
        "expert_success_seed0.mp4",
    ]
    assert len(list(videos.iterdir())) == 2


def test_a_video_that_fails_is_told_and_the_evaluation_goes_on(tmp_path, run_script, caplog):
    (tmp_path / "videos").write_text("no folder")
    run_script("recipes/evaluate.py", *EXPERT, "--output_dir", tmp_path)
    assert f"no video of seed 0 of {TASK}: " in caplog.text
    run_script("recipes/evaluate.py", *EXPERT, "--videos", 0, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 1


def test_episodes_of_other_packages_or_stages_are_not_continued(tmp_path, run_script):
    flags = [*EXPERT, "--videos", 0, "--output_dir", tmp_path]
    run_script("recipes/evaluate.py", *flags)
    config, info = yaml.safe_load((tmp_path / "config.yaml").read_text()), (tmp_path / "eval_info.json").read_bytes()
    for name, part in (("versions", "torch"), ("stage_events", TASK)):
        played = config | {name: config[name] | {part: "another"}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(played))
        with pytest.raises(ValueError, match=rf"has other \['{name}'\]"):
            run_script("recipes/evaluate.py", *flags)
    assert (tmp_path / "eval_info.json").read_bytes() == info


def test_one_command_compares_variations_with_the_nominal_task(checkpoint, tmp_path, run_script):
    flags = ["--model", checkpoint, "--task", TASK, "--episodes", 2, "--num_envs", 2, "--num_workers", 1]
    flags += ["--videos", 0, "--variations", "action/latency", "--output_dir", tmp_path]
    run_script("recipes/evaluate.py", *flags)
    folders = tmp_path / "nominal", tmp_path / "action" / "latency"
    infos = [json.loads((folder / "eval_info.json").read_text()) for folder in folders]
    assert [info["per_task"][0]["metrics"]["environment"]["variation"] for info in infos] == [
        "nominal",
        "action/latency",
    ]
    rows = [read_played(folder / "episodes" / f"{TASK}.parquet") for folder in folders]
    assert [[(row.result.seed, row.variation) for row in played] for played in rows] == [
        [(0, "nominal"), (1, "nominal")],
        [(0, "action/latency"), (1, "action/latency")],
    ]
    assert "Variation: action/latency." in (folders[1] / "eval_info.md").read_text()
    assert "| action/latency | actions come 2 steps late | 2 |" in (tmp_path / "robustness.md").read_text()

    with pytest.raises(ValueError, match="got other variation: .*nominal.*action/latency"):
        run_script("recipes/compare.py", *folders)
    with pytest.raises(ValueError, match=r"same variations, got \['action/latency', 'nominal'\] and \[''\]"):
        run_script("recipes/compare.py", tmp_path, folders[0])
    run_script("recipes/compare.py", tmp_path, tmp_path, "--output", tmp_path / "compared.md")
    lines = (tmp_path / "compared.md").read_text().splitlines()
    compared = [line.split(" | ")[:3] for line in lines if line.startswith("| ")]
    assert compared[0] == ["| variation", "what", "n"]
    assert compared[2:] == [["| nominal", "success_once", "2"], ["| action/latency", "success_once", "2"]]

    # another one is added, not put in the other's place
    flags[flags.index("action/latency")] = "action/noise"
    run_script("recipes/evaluate.py", *flags)
    assert set(played_variations(tmp_path)) == {"nominal", "action/latency", "action/noise"}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a"], "must be two folders, got 1"),
        (["a", "b", "--with", "c"], "as many folders as there are before it, 2, got 1"),
    ],
)
def test_folders_that_cannot_be_paired_are_refused(folders, message, run_script, capsys):
    with pytest.raises(SystemExit):
        run_script("recipes/compare.py", *folders)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "expert", "--task", TASK, "--variations", "light/dimm"], "Did you mean 'light/dim'"),
        (
            ["--model", "expert", "--task", TASK, "--temperature", -1],
            "`temperature` must be a number from 0 on, got -1",
        ),
        (["--model", "expert"], "one of `task` and `suite` must be given"),
        (["--model", "expert", "--task", TASK, "--success_rule", "x"], "`success_rule` must be one of"),
        (["--model", "no/such/folder", "--task", TASK], "there is no such folder"),
        (
            ["--model", "user/vla", "--task", TASK, "--revision", "old", "--push", "true"],
            "`revision` must be left out with `push`.*got 'old'",
        ),
        (["--model", "user/vla", "--task", TASK, "--policy.revision", "v1"], "Say --revision, not --policy.revision"),
        (["--model", "expert", "--task", TASK, "--device", "gpu"], "`device` must be 'cpu', or 'cuda'.*got 'gpu'"),
        (
            ["--model", "expert", "--task", TASK, "--device", "cuda", "--variations", "light/dim"],
            "without `variations`",
        ),
        (["--model", "expert", "--suite", "simpler_widowx", "--seed", 0, 1], "each of the 24 configurations of Put"),
        (
            ["--model", "user/vla", "--suite", "simpler_widowx", "--episodes", 25, "--temperature", 0],
            "got 25 episodes of 24: the others would be repetitions",
        ),
    ],
)
def test_bad_flags(flags, message, tmp_path, run_script):
    with pytest.raises((ValueError, OSError), match=message):
        run_script("recipes/evaluate.py", *flags, "--output_dir", tmp_path)
