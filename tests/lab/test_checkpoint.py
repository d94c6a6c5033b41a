import os
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear
from sparsekern.files import load_
from sparsekern.lab import checkpoint
from tests.saved import leftover


def state(**more):
    """The least that the state of a run holds, and more."""
    return {"rows": [], "finished": False, "history": None} | more


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_checkpoint_stays_and_loads(tmp_path):
    sparse, dense = SparseLinear(32, 32, block_size=8, sparsity=0.5), nn.Linear(3, 2)
    folder = checkpoint.seed_folder(tmp_path, 4)
    assert folder == tmp_path / "checkpoints" / "seed-4"
    assert checkpoint.latest(folder) is None
    checkpoint.save(folder, 9, {"sparse": sparse.state_dict(), "dense": dense.state_dict()}, state(a=1))
    last = checkpoint.save(
        folder, 10, {"sparse": sparse.state_dict(), "dense": dense.state_dict()}, state(a=2, tensor=torch.arange(3))
    )
    assert names(folder) == ["step-00000010"] and checkpoint.latest(folder) == last
    assert names(last) == ["dense.safetensors", "sparse.safetensors", "state.pt"]
    found = checkpoint.load_state(last)
    assert found["a"] == 2 and found["tensor"].tolist() == [0, 1, 2]
    other = SparseLinear(32, 32, block_size=8, sparsity=0.5)
    load_(other, last / "sparse.safetensors")
    assert torch.equal(other.dense_weight(), sparse.dense_weight())


def test_the_same_step_is_written_once(tmp_path):
    first = checkpoint.save(tmp_path, 5, {}, state(a=1))
    assert checkpoint.save(tmp_path, 5, {}, state(a=2)) == first
    assert checkpoint.load_state(first)["a"] == 1


def test_a_crash_while_writing_leaves_the_older_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, {}, state(a=1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tmp_path, 6, {}, state(a=2))
    assert checkpoint.load_state(checkpoint.latest(tmp_path))["a"] == 1
    checkpoint.save(tmp_path, 7, {}, state(a=3))
    assert names(tmp_path) == ["step-00000007"], "what the crash left is gone"


def test_the_newest_is_found_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-100000000"


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_a_damaged_state_is_described(tmp_path, content):
    (tmp_path / "step-00000003").mkdir()
    if content is not None:
        (tmp_path / "step-00000003" / "state.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"state.pt is damaged, or not a .+; there is no older checkpoint: delete .* to train"
    ):
        checkpoint.restore(tmp_path)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_state_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"version": 4, "harm": Harm()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="it asks for more than tensors, which is not loaded"):
        checkpoint.load_state(tmp_path)
    assert names(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("version", [1, 3, 99])
def test_a_state_of_another_version_is_refused(tmp_path, version):
    """Not passed over: the older one beside it would be of no use to the version that wrote this one."""
    checkpoint.save(tmp_path, 5, {}, state(a=1))
    (tmp_path / "step-00000006").mkdir()
    torch.save({"version": version}, tmp_path / "step-00000006" / "state.pt")
    said = f"has format version {version}; this code reads 4: resume with the version of"
    with pytest.raises(checkpoint.OtherVersion, match=said):
        checkpoint.restore(tmp_path)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("content", [[1], {"rows": []}, {"version": "4"}, {"version": 4, "sha256": []}])
def test_something_else_is_no_state(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt (is not the state of a run|has no checksums)"):
        checkpoint.load_state(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.find(b"sha256") if b"sha256" in content else -3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", "dense.safetensors"])
@pytest.mark.parametrize("damage", [cut, flip, type(checkpoint.Path()).unlink])
def test_a_run_goes_on_from_the_one_before_if_the_newest_is_damaged(tmp_path, caplog, name, damage):
    """As a power cut leaves it on a disk that lies about syncing."""
    for step in (5, 6):
        checkpoint.save(tmp_path, step, {"dense": nn.Linear(3, 2).state_dict()}, state(a=step), keep=2)
    damage(tmp_path / "step-00000006" / name)
    path, found = checkpoint.restore(tmp_path)
    assert (path.name, found["a"]) == ("step-00000005", 5)
    assert f"{name} is " in caplog.text and "going on from step-00000005" in caplog.text
    assert names(tmp_path) == ["damaged-step-00000006", "step-00000005"], "step 6 can be written again"
    assert checkpoint.save(tmp_path, 6, {}, state(a=6)) == checkpoint.latest(tmp_path)


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore(tmp_path / "none") is None


def test_the_last_ones_and_the_best_stay(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, {}, {}, keep=2, best=2 if step > 1 else None)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    checkpoint.tidy(tmp_path, 1, best=6)
    assert names(tmp_path) == ["step-00000006"]


def test_every_file_and_folder_is_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    done, folder = [], checkpoint.seed_folder(tmp_path, 0)
    fsync, rename = os.fsync, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(type(tmp_path), "rename", lambda a, b: (done.append("rename"), rename(a, b))[1])
    checkpoint.save(folder, 1, {"dense": nn.Linear(3, 2).state_dict()}, {})
    at = done.index("rename")
    unfinished = done[at - 1]
    assert Path(unfinished).parent.parent == folder
    assert sorted(done[at - 3 : at - 1]) == [f"{unfinished}/dense.safetensors", f"{unfinished}/state.pt"]
    assert done[at + 1 :] == [str(folder)]
    assert done[:2] == [str(tmp_path), str(folder.parent)], "the two above are new with the first checkpoint"


def test_weights_that_do_not_load_are_described(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"dense": nn.Linear(3, 2).state_dict()}, {})
    with pytest.raises(ValueError, match=r"dense.safetensors does not fit .*: weight has shape"):
        load_(nn.Linear(4, 2), folder / "dense.safetensors")
    with pytest.raises(ValueError, match=r"sparse.safetensors cannot be read: No such file"):
        load_(nn.Linear(3, 2), folder / "sparse.safetensors")
    (folder / "dense.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"dense.safetensors is neither a safetensors file"):
        load_(nn.Linear(3, 2), folder / "dense.safetensors")


def test_what_a_kill_left_is_tidied_away(tmp_path):
    """Between the rename and the end of the deletion of the older one, or in the middle of writing."""
    checkpoint.save(tmp_path, 5, {}, state(a=1))
    (tmp_path / "step-00000004").mkdir()
    for number in range(2):
        leftover(tmp_path, number).mkdir()
    checkpoint.tidy(tmp_path)
    assert names(tmp_path) == ["step-00000005"]
    checkpoint.tidy(tmp_path / "none")


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_one_clear_error_or_harmless(tmp_path, seed):
    last = checkpoint.save(tmp_path, 5, {}, state(a=1, text="x" * 50))
    content = bytearray((last / "state.pt").read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(len(content), (8,), generator=generator).tolist():
        content[place] ^= 0xFF
    (last / "state.pt").write_bytes(content)
    reason = None
    try:
        checkpoint.load_state(last)
    except ValueError as error:
        reason = str(error)
    assert reason is None or "state.pt" in reason


def test_text_in_place_of_a_state(tmp_path):
    last = checkpoint.save(tmp_path, 5, {}, state(a=1))
    (last / "state.pt").write_text("junk")
    with pytest.raises(ValueError, match=r"state.pt is damaged, or not a torch.save file of plain tensors: .*"):
        checkpoint.load_state(last)
