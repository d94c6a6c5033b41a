import pytest

from sparsekern.cli.source import saved_seeds, weights_file


def run(folder):
    for seed, steps in ((0, (5, 12)), (3, (7,)), (4, ())):
        for step in steps:
            (folder / "checkpoints" / f"seed-{seed}" / f"step-{step:08d}").mkdir(parents=True)
            (folder / "checkpoints" / f"seed-{seed}" / f"step-{step:08d}" / "sparse.safetensors").touch()
        (folder / "checkpoints" / f"seed-{seed}").mkdir(exist_ok=True)
    (folder / "config.json").touch()
    return folder


def test_a_file_a_checkpoint_and_the_newest_of_a_run(tmp_path):
    folder = run(tmp_path)
    newest = folder / "checkpoints" / "seed-0" / "step-00000012"
    for path in (folder, newest, newest / "sparse.safetensors"):
        assert weights_file(path, "sparse", 0) == newest / "sparse.safetensors"
    assert saved_seeds(folder) == [0, 3]


def test_what_there_is_not(tmp_path):
    folder = run(tmp_path)
    (tmp_path / "grid" / "set-s0.9").mkdir(parents=True)
    for name in ("plan.json", "set-s0.9/config.json"):
        (tmp_path / "grid" / name).touch()
    for path, network, seed, message in (
        (tmp_path / "none", "sparse", 0, "does not exist; give a file of weights"),
        (folder, "sparse", 4, "seed is 4, which has no checkpoint in .*; those that have one: 0, 3"),
        (folder, "dense", 0, "network is 'dense', of which .* has no weights; it has those of: sparse"),
        (
            folder / "checkpoints",
            "sparse",
            0,
            "has no config.json; give a file of weights, a checkpoint folder or a run",
        ),
        (tmp_path / "grid", "sparse", 0, "grid, which is a comparison; give one of the runs in it, such as .*set-s0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_file(path, network, seed)
