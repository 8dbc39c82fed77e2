"""Datasets pushed to a Hub over HTTP and fetched from it, by a process that knows no other Hub."""

import hashlib
import io
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi
from PIL import Image

from trl_stare.data.hub import download_dataset, find_dataset, push_dataset
from trl_stare.data.pairs import build_pairs, load_yield, save_yield, yield_file
from trl_stare.data.schema import load_pairs, load_trajectories, save_pairs, save_trajectories
from trl_stare.data.validate import InvalidDatasetError
from trl_stare.stages import get_plan

sys.path.insert(0, str(Path(__file__).parents[1]))
from minihub import MiniHub  # noqa: E402

PLAN = get_plan("StackCube-v1")
TOKEN = "hf_writer"


@pytest.fixture(scope="module")
def hub():
    with MiniHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    """Calls a function in another process: huggingface_hub reads these variables once, when it is imported."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_TOKEN": TOKEN,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # the process starts while the variables are set
            yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture
def repo_id(request):
    """A repository of each test's own."""
    return "user/" + re.sub(r"\W+", "-", request.node.name).strip("-")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, episode):
    """Three episodes from one start, of which one succeeds, and their pairs."""
    folder = tmp_path_factory.mktemp("data")
    save_episodes(folder, episode, count=3)
    return folder / "rollouts", folder / "pairs"


def save_episodes(folder, episode, count):
    episodes = [episode(0, num_steps=6, success_at=4)] + [episode(0, num_steps=5 + i) for i in range(1, count)]
    pairs = build_pairs(episodes, PLAN, min_cost_gap=0.0)
    save_trajectories(episodes, folder / "rollouts", PLAN, metadata={"visuals": "light", "versions": {"sapien": "3"}})
    save_pairs(pairs.pairs, folder / "pairs")
    save_yield(pairs.yield_table, folder / "pairs")


def test_both_configurations_load_without_our_code(hub, client, folders, repo_id):
    commit = client(push_dataset, *folders, repo_id)
    assert [entry["id"] for entry in hub.repos[repo_id]["commits"]][1:] == [commit]  # after the empty one
    trajectories = client(load_dataset, repo_id, "trajectories", split="train")
    pairs = client(load_dataset, repo_id, "preferences", split="train")
    local = load_trajectories(folders[0])
    assert trajectories["id"] == [0, 1, 2]
    assert np.array_equal(np.array(trajectories[1]["images"][0]), local[1].images[0].numpy())
    assert pairs["chosen"] == [pair.chosen for pair in load_pairs(folders[1])] and len(pairs) > 0
    assert client(load_dataset, repo_id, split="train").features == trajectories.features


def test_what_is_fetched_is_what_was_pushed(hub, client, folders, repo_id):
    commit = client(push_dataset, *folders, repo_id)
    for revision in ("main", commit):
        folder = client(download_dataset, repo_id, revision=revision)
        for ours, theirs in zip(folders, (folder / "trajectories", folder / "preferences"), strict=True):
            assert contents(ours) == contents(theirs)
        assert load_yield(folder / "preferences") == load_yield(folders[1])


def test_pushing_again_makes_no_commit_and_uploads_nothing(hub, client, folders, repo_id):
    first = client(push_dataset, *folders, repo_id)
    del hub.log[:]
    assert client(push_dataset, *folders, repo_id) == first
    assert len(hub.repos[repo_id]["commits"]) == 2
    assert not [path for method, path in hub.log if method == "PUT" or "/commit/" in path or "/preupload/" in path]


def test_new_data_replace_the_old_in_one_commit(hub, client, folders, repo_id, episode, tmp_path):
    client(push_dataset, *folders, repo_id)
    client(add_notes, repo_id, "trajectories/NOTES.md")
    save_episodes(tmp_path, episode, count=4)
    client(push_dataset, tmp_path / "rollouts", None, repo_id)
    before, after = (set(commit["files"]) for commit in hub.repos[repo_id]["commits"][2:])
    assert before - after == {"preferences/train-00000-of-00001.parquet", "preferences_yield.json"}
    assert after == {
        "README.md", "stages.png", "trajectories/NOTES.md", "trajectories/train-00000-of-00001.parquet",
    }  # fmt: skip
    assert len(load_trajectories(client(download_dataset, repo_id) / "trajectories")) == 4


def add_notes(repo_id: str, path: str) -> None:
    """A file of the owner's beside the data."""
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=path, repo_id=repo_id, repo_type="dataset")


def test_a_lost_answer_makes_no_second_commit(hub, client, folders, repo_id):
    hub.fault("POST", "/commit/", "after")
    with pytest.raises(ConnectionError, match="Do the same again"):
        client(push_dataset, *folders, repo_id)
    commit = client(push_dataset, *folders, repo_id)
    assert [entry["id"] for entry in hub.repos[repo_id]["commits"]][1:] == [commit]


@pytest.mark.parametrize("fault", ["close", "status"])
def test_a_push_that_fails_shows_nothing_and_can_be_repeated(hub, client, folders, repo_id, fault):
    hub.fault("POST", "/commit/", fault, status=503)
    with pytest.raises(OSError):
        client(push_dataset, *folders, repo_id)
    assert hub.repos[repo_id]["commits"][-1]["files"] == {}
    client(push_dataset, *folders, repo_id)
    assert len(hub.repos[repo_id]["commits"]) == 2


def test_a_damaged_download_is_noticed_and_not_kept(hub, client, folders, repo_id, tmp_path):
    client(push_dataset, *folders, repo_id)
    hub.fault("GET", "/resolve/.*trajectories/", "corrupt")
    with pytest.raises(OSError, match=r"checksums.*trajectories/train-00000-of-00001\.parquet.*removed") as caught:
        client(download_dataset, repo_id, cache_dir=tmp_path)
    assert type(caught.value) is OSError
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*.parquet")}
    assert digests == {hashlib.sha256(path.read_bytes()).hexdigest() for path in folders[1].glob("*.parquet")}
    folder = client(download_dataset, repo_id, cache_dir=tmp_path)
    assert contents(folder / "trajectories") == contents(folders[0])


def test_a_new_repository_is_as_private_as_its_owner_wants(hub, client, folders, repo_id, monkeypatch):
    for asked, usual, private in ((None, True, True), (None, False, False), (False, True, False), (True, False, True)):
        monkeypatch.setattr(hub, "private", usual)
        name = f"{repo_id}-{asked}-{usual}"
        client(push_dataset, *folders, name, **({} if asked is None else {"private": asked}))
        assert hub.repos[name]["private"] is private


def test_refusals_say_which_token_or_repository(hub, client, folders, repo_id):
    client(push_dataset, *folders, repo_id, private=True)
    hub.tokens["hf_stranger"] = "stranger"
    refused = [
        (push_dataset, (*folders, repo_id), "hf_wrong", PermissionError, r"the token given as `token`.*\(401\)"),
        (push_dataset, (*folders, repo_id), "hf_stranger", PermissionError, rf"{repo_id}.*no right to \(403\)"),
        (push_dataset, (*folders, "lab/x"), None, PermissionError, r"lab/x.*variable `HF_TOKEN`.*\(403\)"),
        (download_dataset, (repo_id,), "hf_wrong", PermissionError, r"the token given as `token`.*\(401\)"),
        (download_dataset, (repo_id,), "hf_stranger", FileNotFoundError, rf"{repo_id}.*\(404\)"),
        (download_dataset, ("user/nothing",), None, FileNotFoundError, r"user/nothing.*variable `HF_TOKEN`"),
    ]
    for function, args, token, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            client(function, *args, token=token)
        assert not any(secret in str(caught.value) for secret in ("hf_wrong", "hf_stranger", TOKEN))
    with pytest.raises(FileNotFoundError, match="revision 'v9'"):
        client(download_dataset, repo_id, revision="v9")


def test_a_repository_of_something_else_is_refused(hub, client, repo_id):
    hub.repos[repo_id] = {"private": False, "commits": [{"id": "0" * 40, "files": {}}]}
    with pytest.raises(FileNotFoundError, match=r"must hold trajectories/\*.parquet"):
        client(download_dataset, repo_id)


def test_invalid_data_are_not_pushed(hub, client, folders, repo_id, tmp_path):
    pairs = load_pairs(folders[1])
    save_pairs([pairs[0].__class__(**{**vars(pairs[0]), "chosen": 77})], tmp_path / "pairs")
    with pytest.raises(InvalidDatasetError, match="77"):
        push_dataset(folders[0], tmp_path / "pairs", repo_id)
    save_pairs(pairs, tmp_path / "pairs")
    yield_file(tmp_path / "pairs").write_text('{"Reach": {"made": 1000}}')
    with pytest.raises(ValueError, match="`yield_table` must count the pairs"):
        push_dataset(folders[0], tmp_path / "pairs", repo_id)
    assert repo_id not in hub.repos


def test_folders_and_repositories_are_found(hub, client, folders, repo_id, tmp_path):
    assert find_dataset(*folders) == folders and find_dataset(folders[0]) == (folders[0], None)
    commit = client(push_dataset, *folders, repo_id)
    save_pairs([], tmp_path / "none")
    client(push_dataset, folders[0], None, repo_id)
    for revision, own in (("main", False), (commit, True)):
        found = client(find_dataset, repo_id, revision=revision)
        assert contents(found[0]) == contents(folders[0])
        assert (found[1] is not None) == own and (not own or contents(found[1]) == contents(folders[1]))
    assert client(find_dataset, repo_id, tmp_path / "none", revision=commit)[1] == tmp_path / "none"
    for wrong in ("user/nothing", "data/roll/outs", str(tmp_path / "nowhere")):
        with pytest.raises(
            FileNotFoundError, match=f"`trajectories` must be a folder or a repository .* got '{wrong}'"
        ):
            client(find_dataset, wrong)
    with pytest.raises(FileNotFoundError, match="`preferences` must be a folder, got 'nowhere'"):
        find_dataset(folders[0], "nowhere")


def test_the_card_tells_what_is_there(hub, client, folders, repo_id):
    client(push_dataset, *folders, repo_id, license="cc-by-4.0")
    files = hub.repos[repo_id]["commits"][-1]["files"]
    card = DatasetCard(hub.blobs[files["README.md"]["key"]].decode())
    assert card.data.license == "cc-by-4.0" and card.data.size_categories == ["n<1K"]
    assert [(c["config_name"], c["data_files"][0]["path"]) for c in card.data.configs] == [
        ("trajectories", "trajectories/*.parquet"),
        ("preferences", "preferences/*.parquet"),
    ]
    made = {stage: counts["made"] for stage, counts in load_yield(folders[1]).items()}
    for part in (
        "3 simulated robot episodes from 1 initial states",
        "| StackCube-v1 | stack the red cube | 3 | 1 | 19 | 33.3 % (1) | 33.3 % (1) |",
        "| StackCube-v1 | Reach | 3 | 3 (100.0 %) |",
        "Who acted: `toy`.",
        f"| Reach | {made['Reach']} |",
        f'load_dataset("{repo_id}", "preferences", split="train")',
        "| versions.sapien | 3 |",
        "](stages.png)",
        "Licence: cc-by-4.0.",
    ):
        assert part in card.text, part
    assert not any(mark in card.text for mark in ("{{", "{%", "None"))
    # the episode that succeeded: four stages and its end
    assert Image.open(io.BytesIO(hub.blobs[files["stages.png"]["key"]])).size == (5 * 192, 154 + 18)


def test_the_token_is_in_no_file(hub, home, client, folders, repo_id):
    """Neither of those on the Hub nor of those in the cache, of this test and of those before it."""
    client(push_dataset, *folders, repo_id)
    client(download_dataset, repo_id)
    assert not [key for key, content in hub.blobs.items() if TOKEN.encode() in content]
    left = [path for path in home.rglob("*") if path.is_file()]
    assert left and not [path for path in left if TOKEN.encode() in path.read_bytes()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
