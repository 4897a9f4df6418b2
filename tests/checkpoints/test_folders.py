"""Folders appear in one step, or not at all; the finished files of an interrupted job stay."""

import errno
import os
from contextlib import suppress

import pytest

from moe_precision.checkpoints import CheckpointError
from moe_precision.checkpoints.folders import folder_replaced_when_done, resumable_folder


@pytest.fixture
def old(tmp_path):
    """A checkpoint folder that already exists."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def write(folder, name):
    (folder / name).write_text(name)


@pytest.mark.parametrize("replacing", [folder_replaced_when_done, lambda path: resumable_folder(path, "a job")])
def test_a_folder_takes_the_place_of_another(replacing, old, tmp_path):
    with replacing(old) as temporary:
        write(temporary, "model.safetensors")
        assert os.listdir(old) == ["config.json"]
    assert os.listdir(old) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("replacing", [folder_replaced_when_done, lambda path: resumable_folder(path, "a job")])
def test_what_is_no_checkpoint_is_not_replaced(replacing, tmp_path):
    write(tmp_path, "thesis.tex")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="is not a checkpoint folder"), replacing(path):
            pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("error", [ValueError, CheckpointError, MemoryError, OSError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_job_early_its_files_stay(error, old, tmp_path):
    def run(*names):
        with resumable_folder(old, "a job") as folder:
            found = {file.name for file in folder.iterdir()}
            for name in names:
                write(folder, name)
            if "last" not in names:
                raise error("bad")
        return found

    with pytest.raises(error):
        run()
    assert os.listdir(tmp_path) == ["out"]  # nothing was there to keep
    with pytest.raises(error):
        run("first", ".second.1234.tmp")
    with pytest.raises(error):
        run("second")
    assert os.listdir(old) == ["config.json"]
    assert run("last") - {".lock"} == {"first", "second"}
    assert sorted(os.listdir(old)) == ["first", "last", "second"]
    assert os.listdir(tmp_path) == ["out"]


def test_another_job_starts_anew(old, tmp_path):
    with suppress(ValueError), resumable_folder(old, "a job") as folder:
        write(folder, "first")
        raise ValueError
    assert (folder / "first").exists()
    with resumable_folder(old, "b job") as folder:
        assert not (folder / "first").exists()
        assert list(tmp_path.glob(".out.a job*")) == []


def test_one_writer_at_a_job(old):
    with resumable_folder(old, "a job") as folder:
        write(folder, "first")
        with pytest.raises(BlockingIOError, match="another process is writing into"), resumable_folder(old, "a job"):
            pass
        with resumable_folder(old, "b job"):  # leaves a job that is being written alone
            assert (folder / "first").exists()


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, old, tmp_path, monkeypatch):
    """A killed process leaves its lock file, which blocks nobody; what another job has left may be in use."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with suppress(ValueError), resumable_folder(old, "a job") as folder:
        write(folder, "first")
        raise ValueError
    (folder / ".lock").write_text("12345\nanother-machine\n")
    with suppress(ValueError), resumable_folder(old, "b job") as other:
        write(other, "other")
        raise ValueError
    with resumable_folder(old, "a job") as folder:
        assert (folder / "first").exists()
        write(folder, "last")
    assert sorted(os.listdir(old)) == ["first", "last"]
    assert (other / "other").exists()


def test_an_error_of_a_file_system_with_locks_is_raised(old, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    with pytest.raises(OSError, match="bad disk"), resumable_folder(old, "a job"):
        pass
