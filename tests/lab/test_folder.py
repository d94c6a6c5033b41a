import json
from datetime import datetime
from pathlib import Path

import pytest

from sparsekern.lab.config import Config
from sparsekern.lab.folder import Metrics, create, default_folder, read_config, read_json, read_keeping, write_json
from sparsekern.lab.keeping import Keeping
from sparsekern.lab.lock import locked
from tests.saved import leftover

DATA = {"name": "x", "train_images": 9, "test_images": 3}
RESOLVED = Config(device="cpu").resolved(9, 1).to_json()


def damaged(**entries):
    """A config.json that is valid but for the given entries."""
    return json.dumps({"format_version": 3, "config": RESOLVED, "data": DATA} | entries)


def test_the_default_name_says_what_and_when():
    now = datetime(2026, 11, 20, 9, 5, 1)
    assert default_folder(Config(sparsity=0.95), now) == Path("runs/20261120-090501-set-0.95")
    assert default_folder(Config(recipe="wrn-28-4"), now) == Path("runs/20261120-090501-wrn-28-4-set-0.9")


def test_config_and_back(tmp_path):
    config = Config(epochs=3).resolved(9, 1)
    create(tmp_path / "a" / "b", config, DATA, {"torch": "1"})
    assert read_config(tmp_path / "a" / "b") == (config, DATA)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["format_version"] == 3


def test_a_run_of_the_first_format_is_read(tmp_path):
    options = {"data": None, "sparsity": 0.8, "block_size": 8, "method": "set", "width": 64, "epochs": 4}
    options |= {"batch_size": 64, "rate": 1e-3, "update_every": 8, "seeds": 1, "device": "cpu", "dense": True}
    content = {"format_version": 1, "config": options, "data": DATA, "environment": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, data = read_config(tmp_path)
    assert (config.width, config.recipe, data) == (64, "mlp", DATA) and read_keeping(tmp_path) == Keeping()


def test_a_comparison_is_no_run(tmp_path):
    write_json(tmp_path / "plan.json", {"plan": {}})
    with pytest.raises(
        ValueError, match="is a comparison; give one of the runs in it. All of them go on by: sparsekern"
    ):
        read_config(tmp_path)
    create(tmp_path / "set-s0.9", Config(), {}, {})
    with pytest.raises(ValueError, match=r"such as .*set-s0.9. All of them go on by: sparsekern compare --out "):
        read_config(tmp_path)


def test_nothing_is_overwritten(tmp_path):
    create(tmp_path, Config(), {}, {})
    with pytest.raises(ValueError, match=r"not empty; resume it with --resume, or choose another --out"):
        create(tmp_path, Config(), {}, {})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be made .*choose another --out"):
            create(path, Config(), {}, {})


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a run"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "missing or damaged"),
        pytest.param("[" * 10**5, "missing or damaged", id="deep"),
        ("[]", "missing or damaged"),
        ("{}", "missing or damaged"),
        ('{"format_version": 99}', "has format version 99; this code reads 1 to 3"),
        ('{"format_version": 0}', "has format version 0"),
        ('{"format_version": "3"}', "has format version 3"),
        ('{"format_version": 3}', "is damaged: config: field required; start a new run"),
        ('{"format_version": 3, "config": [], "data": {}}', "is damaged: config: input should be a valid dictionary"),
        (damaged(config={"width": 0}), "other entries.*or start a new run"),
        (damaged(data="digits"), "is damaged: data: input should be a valid dictionary"),
        (damaged(data=DATA | {"train_images": "9"}), "is damaged: data.train_images: input should be a valid integer"),
        (damaged(config=RESOLVED | {"epochs": None}), "cannot be used: epochs must not be null"),
        (damaged(config=RESOLVED | {"augment": None, "device": None}), "augment and device must not be null"),
        (damaged(config=RESOLVED | {"width": 10**30}), "width is 10+; it must be a whole number of 1 to 2147483647"),
    ],
)
def test_a_damaged_configuration_is_described(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"format_version": 3, "a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_metrics_begin_with_the_rows_of_the_checkpoints(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    metrics = Metrics(path, [{"epoch": 1}])
    metrics.append({"epoch": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"epoch": 1}, {"epoch": 2}]


def test_a_run_killed_at_its_first_file_can_begin_again(tmp_path):
    (half := leftover(tmp_path)).mkdir()
    (half / "content.json").write_text('{"form')
    create(tmp_path, Config(), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_of_something_else_is_not_said_to_be_resumable(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"which is not empty; choose another --out$"):
        create(tmp_path, Config(), {}, {})


def test_what_a_run_keeps(tmp_path):
    create(tmp_path, Config(), {}, {}, Keeping("500", 4))
    assert read_keeping(tmp_path) == Keeping("500", 4)
    content = json.loads((tmp_path / "config.json").read_text())
    for keeping, message in (
        ([], "not the configuration of a run"),
        ({"best": 1}, "does not know: .'best'"),
        ({"keep": 0}, "keep is 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | {"keeping": keeping}))
        with pytest.raises(ValueError, match=message):
            read_keeping(tmp_path)
    del content["keeping"]  # an older run does not say
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_keeping(tmp_path) == Keeping()


def test_a_lock_is_no_content(tmp_path):
    with locked(tmp_path):
        create(tmp_path, Config(), {}, {})
