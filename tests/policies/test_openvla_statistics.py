"""`dataset_statistics.json`, where the published fine-tuning of OpenVLA writes new statistics: it comes before the config's."""

import json

import pytest
from openvla_toy import OPENVLA_STATS, make_openvla
from peft import LoraConfig, get_peft_model

from trl_stare.policies import TokenPolicy
from trl_stare.policies.adapters import merge_checkpoint

NEW = {"my_robot": {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7}}}
STATISTICS = "dataset_statistics.json"


@pytest.fixture(scope="module")
def policy():
    return make_openvla()


def in_use(loaded) -> tuple[str, float]:
    return loaded.unnorm_key, loaded.bins.statistics.second[0].item()


@pytest.mark.parametrize(
    ("beside", "given", "expected"),
    [
        (None, {}, ("bridge_orig", 0.02)),
        (NEW, {}, ("my_robot", 2.0)),  # wholly: the only key left needs no name
        ({"bridge_orig": NEW["my_robot"]}, {}, ("bridge_orig", 2.0)),
        (NEW, {"norm_stats": OPENVLA_STATS}, ("bridge_orig", 0.02)),
        (NEW, {"oft": {"chunk_size": 2}}, ("my_robot", 2.0)),
    ],
)
def test_statistics_beside_a_config_take_the_place_of_its_own(policy, tmp_path, beside, given, expected):
    """Wholly, as the published evaluation does it; what we save has them in its config, and no file."""
    policy.save_pretrained(tmp_path)
    if beside is not None:
        (tmp_path / STATISTICS).write_text(json.dumps(beside))
    loaded = TokenPolicy.from_pretrained(tmp_path, **given)
    assert in_use(loaded) == expected
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / STATISTICS).exists() and in_use(TokenPolicy.from_pretrained(tmp_path)) == expected
    assert list(json.loads((tmp_path / "config.json").read_text())["norm_stats"]) == [expected[0]]


def test_statistics_beside_the_base_are_those_of_an_adapter_without_a_config(policy, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    policy.save_pretrained(base)
    (base / STATISTICS).write_text(json.dumps(NEW))
    trained = TokenPolicy.from_pretrained(base)
    trained.model = get_peft_model(trained.model, LoraConfig(r=2, target_modules=["q_proj"]))
    trained.save_pretrained(adapter)
    (base / STATISTICS).write_text(json.dumps({"another": NEW["my_robot"]}))
    assert in_use(TokenPolicy.from_pretrained(adapter)) == ("my_robot", 2.0)  # what it was trained with
    (adapter / "policy_config.json").unlink()
    assert in_use(TokenPolicy.from_pretrained(adapter)) == ("another", 2.0)
    (adapter / STATISTICS).write_text(json.dumps(OPENVLA_STATS))
    assert in_use(TokenPolicy.from_pretrained(adapter)) == ("bridge_orig", 0.02)
    merge_checkpoint(adapter)
    assert not (adapter / STATISTICS).exists() and in_use(TokenPolicy.from_pretrained(adapter))[0] == "bridge_orig"


def test_statistics_of_a_revision_on_the_hub(policy, tmp_path):
    """Two commits in a cache of the Hub's, each with its own."""
    repo = tmp_path / "models--user--vla"
    (repo / "refs").mkdir(parents=True)
    for revision, commit, key in (("v1", f"{1:040x}", "first"), ("main", f"{2:040x}", "second")):
        policy.save_pretrained(repo / "snapshots" / commit)
        (repo / "snapshots" / commit / STATISTICS).write_text(json.dumps({key: NEW["my_robot"]}))
        (repo / "refs" / revision).write_text(commit)
    for options, key in (({"revision": "v1"}, "first"), ({}, "second")):
        assert TokenPolicy.from_pretrained("user/vla", cache_dir=tmp_path, **options).unnorm_key == key


@pytest.mark.parametrize("text", ["[]", '{"my_robot": {"act', ""])
def test_statistics_that_are_broken_are_refused(policy, tmp_path, text):
    policy.save_pretrained(tmp_path)
    (tmp_path / STATISTICS).write_text(text)
    with pytest.raises(ValueError, match=r"dataset_statistics.json` must hold statistics by their keys, got "):
        TokenPolicy.from_pretrained(tmp_path)
