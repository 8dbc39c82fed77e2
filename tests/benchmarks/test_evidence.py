"""The evidence queue: what a file of arms means, learning curves and tables by hand, runs that are interrupted or fail."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence import curves  # noqa: E402
from benchmarks.evidence.curves import Point, learning_curve, moving_success, plot, steps_to_reach  # noqa: E402
from benchmarks.evidence.queue import Queue, read_queue  # noqa: E402
from benchmarks.evidence.results import build_results, learning, markdown  # noqa: E402
from benchmarks.evidence.runs import Step, evaluate_start, run_step, steps_of  # noqa: E402
from benchmarks.preference_learning import parse  # noqa: E402
from trl_stare import TokenPolicy, get_plan  # noqa: E402
from trl_stare.evaluation import EpisodeResult, file_digests, read_episodes  # noqa: E402
from trl_stare.stages import Segment  # noqa: E402
from trl_stare.trainers.presets import PPO_PRESETS  # noqa: E402

CONFIGS = sorted((ROOT / "recipes" / "configs" / "evidence").glob("*.yaml"))
SMOKE = ROOT / "recipes" / "configs" / "evidence" / "smoke.yaml"


def write(folder: Path, text: str) -> Path:
    (folder / "queue.yaml").write_text(text)
    return folder / "queue.yaml"


def test_arms_take_what_they_share_and_change_it(tmp_path):
    queue = read_queue(
        write(
            tmp_path,
            """
task: StackCube-v1
start: weak
seeds: [0, 1]
ppo: {preset: small-cpu, num_train_epochs: 16}
arms:
  ppo:
  literal: {method: sta-ppo, seeds: [1, 0], ppo: {potential_form: literal}}
""",
        )
    )
    ppo, literal = queue.arms
    assert (ppo.method, ppo.start, ppo.seeds) == ("ppo", "weak", (0, 1))
    assert literal.ppo == {"preset": "small-cpu", "num_train_epochs": 16, "potential_form": "literal"}
    assert [(seed, arm.name) for seed, arm in queue.runs] == [(0, "ppo"), (0, "literal"), (1, "ppo"), (1, "literal")]
    assert queue.task == "StackCube-v1" and read_queue(tmp_path / "queue.yaml", "PushCube-v1").task == "PushCube-v1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{task: T, start: s, seeds: [0], arms: {grpo: }}", "`method` of arm 'grpo' must be one of sft, tpo"),
        ("{task: T, start: s, seeds: [0, 0], arms: {ppo: }}", r"different training seeds, got \[0, 0\]"),
        ("{task: T, start: s, arms: {ppo: }}", r"different training seeds, got \[\]"),
        ("{task: T, start: s, seeds: [0], arms: {ppo: {lr: 1}}}", "arm 'ppo' must hold only .*got lr"),
        ("{task: T, start: s, seeds: [0], arms: {tpo: {ppo: {gamma: 0.5}}}}", "`ppo` of arm 'tpo' must be left out"),
        ("{task: T, start: s, seeds: [0], arms: {ppo: {preference: {a: 1}}}}", "`preference` of arm 'ppo' must be"),
        ("{task: T, start: ppo, seeds: [0], arms: {ppo: }}", "named otherwise than the arms, got ppo"),
        ("{task: T, start: s, seeds: [0], episodes: 3, arms: {ppo: }}", "got episodes"),
        ("{task: T, start: s, seeds: [0], arms: {tpo: {rounds: 0}}}", "`rounds` of arm 'tpo' must be at least 1"),
        ("{task: T, start: s, seeds: [0], arms: {ppo: {rounds: 2}}}", "1 for a method without preferences, got 2"),
        ("{task: T, start: s, seeds: [0], compare: [[ppo, x]], arms: {ppo: }}", r"pairs of ppo, got \['ppo', 'x'\]"),
        ("{task: T, start: s, seeds: [0], eval_episodes: 0, arms: {ppo: }}", "`eval_episodes` must be at least 1"),
        ("{task: T, start: s, seeds: [0], levels: [50], arms: {ppo: }}", r"`levels` must be rates in .*got \[50\]"),
    ],
)
def test_what_makes_no_queue_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_queue(write(tmp_path, text))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_committed_queues_can_be_read(path):
    queue = read_queue(path)
    assert get_plan(queue.task) and all(arm.start for arm in queue.arms)
    assert path == SMOKE or (queue.eval_episodes >= 300 and all(len(arm.seeds) >= 3 for arm in queue.arms))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_committed_queues_give_flags_that_preference_learning_takes(path, tmp_path):
    queue = read_queue(path)
    for arm in queue.arms:
        for step in steps_of(queue, arm, 0, Path("/start"), tmp_path):
            if step.script == "benchmarks/preference_learning.py":
                args, config = parse(step.command[2:])
                assert {**arm.preference, "seed": 0} == {
                    name: (vars(args) | vars(config))[name] for name in (*arm.preference, "seed")
                }


@pytest.mark.parametrize("name", ["ppo_rare_hot", "ppo_never_hot"])
def test_the_preset_for_rare_success_is_what_was_measured(name):
    queue = read_queue(SMOKE.with_name(f"{name}.yaml"))
    given = dict(next(arm for arm in queue.arms if arm.name == "stage-norm").ppo)
    measured = PPO_PRESETS[given.pop("preset")] | given
    for field in ("num_train_epochs", "logging_steps"):
        del measured[field]
    assert measured == PPO_PRESETS["small-cpu-rare"]


def test_a_list_among_the_settings_reaches_the_script(tmp_path):
    text = "{task: T, start: s, seeds: [0], preference: {stage_weights: [1.0, 8]}, arms: {sta-tpo: }}"
    queue = read_queue(write(tmp_path, text))
    (step,) = steps_of(queue, queue.arms[0], 0, Path("/start"), tmp_path)
    assert parse(step.command[2:])[1].stage_weights == [1.0, 8.0]


def test_preference_learning_refuses_what_it_would_not_pass_on(tmp_path):
    flags = ["--checkpoint=/start", f"--output_dir={tmp_path}"]
    assert parse([*flags, "--margin_sign=-1"])[1].margin_sign == -1
    with pytest.raises(ValueError, match=r"must be among .*got \['warmup_steps'\]"):
        parse([*flags, "--warmup_steps=10"])


def test_what_each_method_runs(tmp_path):
    queue = read_queue(SMOKE)
    steps = {arm.name: steps_of(queue, arm, 0, Path("/start"), tmp_path) for arm in queue.arms}
    assert steps["sft"] == []
    (tpo,), (sta_tpo,), (ppo,), (sta_ppo,) = (steps[name] for name in ("tpo", "sta-tpo", "ppo", "sta-ppo"))
    assert tpo.flags["rollouts"] == sta_tpo.flags["rollouts"]  # both learn from the same episodes
    assert {name for name in tpo.flags if tpo.flags[name] != sta_tpo.flags[name]} == {
        "arms"
    } and tpo.folder != sta_tpo.folder
    assert (ppo.flags["stage_aware"], sta_ppo.flags["stage_aware"]) == (False, True)
    assert {name for name in ppo.flags if ppo.flags[name] != sta_ppo.flags[name]} == {"stage_aware"}
    assert steps["ipi"][0] == sta_tpo and steps["ipi"][1].flags["model"] == sta_tpo.policy
    assert steps["ipi"][1].folder != sta_ppo.folder


def test_rounds_go_on_from_the_round_before_and_from_new_starts(tmp_path):
    text = "{task: T, start: s, seeds: [0], preference: {starts: 50}, arms: {tpo: , tpo-3: {method: tpo, rounds: 3}, ipi: {rounds: 2}}}"
    once, thrice, ipi = (
        steps_of(queue, arm, 0, Path("/start"), tmp_path)
        for queue in [read_queue(write(tmp_path, text))]
        for arm in queue.arms
    )
    assert [once[0], once[0].policy, thrice[1].policy] == [
        thrice[0],
        *(step.flags["checkpoint"] for step in thrice[1:]),
    ]
    first = [parse(step.command[2:])[0].first_seed for step in thrice]
    assert first == [200_000, 200_050, 200_100]
    assert len({step.flags["rollouts"] for step in thrice}) == len({step.folder for step in thrice}) == 3
    assert [step.script for step in ipi] == ["benchmarks/preference_learning.py"] * 2 + ["recipes/ppo.py"]
    assert ipi[2].flags["model"] == ipi[1].policy


def ledger(path: Path, rows: list) -> Path:
    names = ("iteration", "length", "success", "start_stage")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_a_learning_curve_by_hand(tmp_path):
    rows = [(0, 50, False, "Reach"), (0, 30, True, "Reach"), (1, 20, True, "Reach"), (1, 10, True, "Grasp")]
    file = ledger(tmp_path / "episodes.jsonl", rows)
    with file.open("a") as more:
        more.write(json.dumps({"iteration": 2, "length": 5, "void": "reward"}) + "\n")
    curve = learning_curve(file, "Reach", steps_before=100)
    # an episode begun later and a void one cost steps and are no success rate
    assert curve == [Point(180, 1, 2), Point(210, 1, 1), Point(215, 0, 0)]
    assert moving_success(curve, 1)[0] == (180, 1, 2)
    assert [(point.env_steps, point.solved / point.played) for point in moving_success(curve, 2)] == [
        (210, 2 / 3),
        (215, 1.0),
    ]
    assert [steps_to_reach(curve, level, 2) for level in (0.5, 0.8)] == [210, 215]
    assert steps_to_reach(curve[:2], 0.8, 2) is None and moving_success(curve, 4) == []


PLAN = get_plan("StackCube-v1")


def episode(seed: int, passed: int) -> EpisodeResult:
    """An episode that passed so many of the four stages."""
    segments = tuple(Segment(k, k, k + 1, k < passed, 0.0) for k in range(min(passed + 1, 4)))
    return EpisodeResult(seed, passed == 4, passed == 4, 50, passed == 4, passed != 4, segments)


def evaluations(*passed: str) -> dict[int, list[EpisodeResult]]:
    return {seed: [episode(i, int(digit)) for i, digit in enumerate(digits)] for seed, digits in enumerate(passed)}


def test_the_levels_whose_cost_is_told_are_the_queues(tmp_path):
    """Two rollouts of ten episodes of 100 steps: one succeeds in the first, two in the second."""
    queue = read_queue(
        write(
            tmp_path,
            "{task: StackCube-v1, start: weak, seeds: [0], window: 1, levels: [0.1, 0.2, 0.3, 0.304], arms: {ppo: }}",
        )
    )
    (step,) = steps_of(queue, queue.arms[0], 0, Path("/start"), tmp_path)
    step.ledger.parent.mkdir(parents=True)
    solved = [*(i == 0 for i in range(10)), *(i < 2 for i in range(10))]
    ledger(step.ledger, [(1 + i // 10, 100, level, "Reach") for i, level in enumerate(solved)])
    assert learning(queue, {0: [step]}, "Reach")["reach"] == {
        "10%": {0: 1000},
        "20%": {0: 2000},
        "30%": {0: None},
        "30.4%": {0: None},
    }


@pytest.fixture
def results(tmp_path):
    text = "{task: StackCube-v1, start: weak, seeds: [0, 1], compare: [[ppo, sta-ppo]], arms: {ppo: , sta-ppo: }}"
    queue = read_queue(write(tmp_path, text))
    start, ppo, sta = evaluations("1111", "1114"), evaluations("1144", "1134"), evaluations("4444", "1444")
    arms = {}
    for arm, episodes, level in zip(queue.arms, (ppo, sta), (False, True), strict=True):
        steps = {}
        for seed in arm.seeds:
            (step,) = steps_of(queue, arm, seed, Path("/start"), tmp_path)
            step.ledger.parent.mkdir(parents=True)
            ledger(step.ledger, [(i, 1000, level, "Reach") for i in range(3)])
            steps[seed] = [step]
        arms[arm.name] = (steps, episodes)
    return build_results(queue, PLAN, {"weak": start}, arms, {"weak": {"path": "/start"}})


def test_results_by_hand(results):
    ppo, sta = results["arms"]["ppo"], results["arms"]["sta-ppo"]
    assert (ppo["n_episodes"], ppo["success_once"], sta["success_once"]) == (8, 3 / 8, 7 / 8)
    assert sta["success_once_per_seed"] == {0: 1.0, 1: 0.75}
    assert ppo["stage_counts"] == {"Reach": [8, 8], "Grasp": [4, 8], "Transport": [4, 4], "Stack": [3, 4]}
    assert ppo["lost"] == {"Reach": 0, "Grasp": 0.5, "Transport": 0, "Stack": 0.125}
    assert (ppo["loses_most_in"], sta["loses_most_in"]) == ("Grasp", "Grasp")
    assert sta["env_steps"] == {0: 3000, 1: 3000} and sta["reach"] == {
        "50%": {0: 2000, 1: 2000},
        "80%": {0: 2000, 1: 2000},
    }
    assert ppo["reach"]["50%"] == {0: None, 1: None}
    tests = {(test["a"], test["b"]): test for test in results["comparisons"]}
    assert set(tests) == {("weak", "ppo"), ("weak", "sta-ppo"), ("ppo", "sta-ppo")}
    paired = tests["ppo", "sta-ppo"]
    # of eight pairs four are solved by StA-PPO alone: p = 2 / 2^4
    assert (paired["n"], paired["b_only"], paired["a_only"], paired["p_value"]) == (8, 4, 0, 0.125)
    assert [part["difference"] for part in paired["per_seed"].values()] == paired["over_seeds"] == [0.5, 0.5]
    # +1 and +0.5: their mean, 0.75, +- 12.706, of Student's t for two runs, times 0.25
    assert tests["weak", "sta-ppo"]["over_seeds"] == pytest.approx([0.75 - 3.1766, 0.75 + 3.1766], abs=1e-3)
    # all reach; of Grasp and Transport three more, all of them StA-PPO alone: p = 2 / 2^3
    assert [paired["per_stage"][stage]["p_value"] for stage in PLAN.names] == [1.0, 0.25, 0.25, 0.125]
    assert [paired["per_stage"][stage]["difference"] for stage in PLAN.names] == [0.0, 3 / 8, 3 / 8, 0.5]
    # of Grasp +0.5 and +0.25: 0.375 +- 12.706 times 0.125
    grasp = paired["per_stage"]["Grasp"]
    assert [part["difference"] for part in grasp["per_seed"].values()] == [0.5, 0.25]
    assert grasp["over_seeds"] == pytest.approx([0.375 - 1.5883, 0.375 + 1.5883], abs=1e-3)
    assert paired["per_stage"]["Reach"]["over_seeds"] == [0, 0]


def test_the_table_and_the_picture(results, tmp_path):
    text = markdown(results)
    assert "| sta-ppo | 8 | 87.5 % [52.9, 97.8] | 100.0, 75.0 | 2, 2 | 2, 2 | 3, 3 |" in text
    assert "| sta-ppo | 8 | 7 | 7 | 7 | Grasp (12 % of episodes) |" in text
    assert "| weak -> sta-ppo | 8 | +75.0 " in text and "| +100.0, +50.0 [-242.7, +392.7] | 6, 0 |" in text
    assert "| ppo -> sta-ppo | 8 | +50.0 " in text and "Not finished" not in text
    assert ", p = 0.25; seeds [-121.3, +196.3] | +37.5 " in text
    assert "| to 50 %, 1000 steps | to 80 %, 1000 steps | 1000 steps in all |" in text
    plot(tmp_path / "results.png", json.loads(json.dumps(results)))
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_more_arms_than_colours_are_all_drawn(results, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(curves.plt, "close", shown.append)
    arms = {f"arm {k}": results["arms"]["ppo"] for k in range(8)}
    plot(tmp_path / "results.png", json.loads(json.dumps(results | {"arms": arms})))
    monkeypatch.undo()
    names = [text.get_text() for text in shown[0].axes[0].get_legend().get_texts()]
    curves.plt.close(shown[0])
    assert names == list(arms)


def script_step(folder: Path, source: str) -> Step:
    script = folder / "script.py"
    script.write_text(f"import pathlib, sys, time\nout = pathlib.Path(sys.argv[-1].split('=')[1])\n{source}\n")
    done = folder / "step" / "training" / "done"
    return Step(folder / "step", str(script), {"seed": 0}, policy=done, episodes=done, done=done)


def test_a_start_is_evaluated_once_and_only_for_its_weights_and_queue(tmp_path):
    stats = {"action": {"scale": [0.7, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    TokenPolicy.create_tiny({"PushCube-v1": stats}, image_size=16, chunk_size=5).save_pretrained(
        str(tmp_path / "weak")
    )
    digests, file = file_digests(tmp_path / "weak"), tmp_path / "starts" / "weak" / "seed-0.jsonl"
    queue = dataclasses.replace(read_queue(SMOKE), eval_episodes=1, num_envs=1)
    evaluate_start(queue, tmp_path / "weak", digests, file, 0)
    found = file.read_bytes()
    (file.parent / "config.yaml").unlink()  # folders of earlier versions have none
    evaluate_start(queue, Path("/not/loaded/again"), digests, file, 0)
    for name, value in {"temperature": 0.5, "task": "StackCube-v1", "eval_episodes": 2, "num_envs": 2}.items():
        names = ["stage_events", "task"] if name == "task" else [name]
        with pytest.raises(ValueError, match=re.escape(f"has other {names}")):
            evaluate_start(dataclasses.replace(queue, **{name: value}), tmp_path / "weak", digests, file, 0)
    with pytest.raises(ValueError, match=r"has other \['files'\]"):
        evaluate_start(queue, tmp_path / "weak", digests | {"model.safetensors": "another"}, file, 1)
    assert file.read_bytes() == found and len(read_episodes(file)) == 1


WRITE = "out.mkdir(exist_ok=True); (out / 'done').write_text((out / 'done').read_text() + 'x' if (out / 'done').exists() else 'x')"


def test_a_step_runs_once_and_belongs_to_its_settings(tmp_path):
    step = script_step(tmp_path, WRITE)
    assert run_step(step) and run_step(step) and step.done.read_text() == "x"
    with pytest.raises(ValueError, match="other \\['seed'\\]"):
        run_step(Step(**vars(step) | {"flags": {"seed": 1}}))


def test_a_step_that_fails_is_told(tmp_path, caplog):
    step = script_step(tmp_path, "sys.exit('no such thing')")
    assert not run_step(step) and "exit status 1 and is not done" in caplog.text
    assert "no such thing" in (step.folder / "log.txt").read_text()


@pytest.mark.slow
def test_what_a_killed_queue_left_running_is_waited_for(tmp_path):
    step = script_step(tmp_path, f"(out.parent / 'began').touch(); time.sleep(3); {WRITE}")
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.evidence.runs import Step, run_step; "
        "p = [Path(a) for a in sys.argv[1:]]; run_step(Step(p[0], str(p[1]), {'seed': 0}, p[2], p[2], p[2]))"
    )
    line = [sys.executable, "-c", code, *map(str, (step.folder, step.script, step.done))]
    queue = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (step.folder / "began").exists():
        assert queue.poll() is None
        time.sleep(0.02)
    queue.kill()
    queue.wait()
    assert not step.done.exists()
    assert run_step(step) and step.done.read_text() == "x"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smoke_queue_from_beginning_to_end(tmp_path):
    flags = {
        "task": read_queue(SMOKE).task,
        "phases": "imitation",
        "num_demonstrations": 16,
        "imitation.max_steps": 150,
        "eval_episodes": 4,
    }
    flags |= {"output_dir": tmp_path / "made"}
    config = ["--config", "recipes/configs/ipi_starts.yaml"]
    imitate = [sys.executable, "recipes/ipi.py", *config, *(f"--{name}={value}" for name, value in flags.items())]
    made = subprocess.run(imitate, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    line = [sys.executable, "-m", "benchmarks.evidence", "--config", str(SMOKE), "--output_dir", str(tmp_path / "out")]
    line += ["--checkpoint", f"start={tmp_path / 'made' / 'imitation'}"]
    before = None
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert list(results["arms"]) == ["sft", "tpo", "sta-tpo", "ppo", "sta-ppo", "ipi"]
        assert before in (None, results)
        before = results
    assert "running" not in done.stderr


def test_the_queue_is_a_value():
    with pytest.raises(ValueError, match="`seeds` in common"):
        arms = read_queue(SMOKE).arms
        Queue("T", (arms[0], type(arms[0])(**vars(arms[1]) | {"seeds": (3,)})), compare=(("sft", "tpo"),))
