import errno
import fcntl
import multiprocessing
import os
import signal

import pytest

from sparsekern.lab import store
from sparsekern.lab.store import LOCK, locked


def hold(folder, ready):
    with locked(folder):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder until it is killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_the_second_process_is_told_who_has_it(tmp_path, holder):
    message = rf"the folder .* is in use by another process \({holder.pid} on .*\); wait for it, or stop it first"
    with pytest.raises(ValueError, match=message), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).is_file(), "what the first one holds is left alone"


def test_a_killed_process_locks_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / LOCK).is_file()
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_it_is_opened_by_an_error_too_and_makes_the_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"), locked(tmp_path / "a" / "b"):
            raise RuntimeError("boom")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"file cannot be written \(.*\); choose another one"),
        locked(tmp_path / "file"),
    ):
        pass


def test_a_file_that_its_owner_deleted_in_between_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    flock, deleted = fcntl.flock, []

    def first_deleted(*arguments):
        if not deleted:
            deleted.append((tmp_path / LOCK).unlink())
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", first_deleted)
    with locked(tmp_path):
        assert deleted and (tmp_path / LOCK).is_file()
        with pytest.raises(ValueError, match="in use"), locked(tmp_path):
            pass


def test_an_owner_that_cannot_be_read_is_not_named(tmp_path):
    assert store._owner(tmp_path / "none") == "" and store._owner(tmp_path) == ""


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP"])
def test_a_disk_without_locks_is_used_without_them(tmp_path, monkeypatch, code):
    def fail(*arguments):
        raise OSError(getattr(errno, code), "no lock")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem")
def test_on_a_disk_without_flock_the_file_is_the_lock(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSYS, "no flock")

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        with locked(tmp_path):
            text = (tmp_path / LOCK).read_text()
            with (
                pytest.raises(ValueError, match=rf"in use by another process \({os.getpid()} on .*\)"),
                locked(tmp_path),
            ):
                pass
            assert (tmp_path / LOCK).read_text() == text, "filelock's own mark stays as it is"
        assert list(tmp_path.iterdir()) == []
