"""Nothing half-written under a final name, one job per folder, and a journal that can be trusted."""

import errno
import json
import os
import subprocess
import sys

import pytest

from hybridize import storage
from hybridize.errors import ConfigError
from hybridize.storage import LargeFile, Staging, disk_errors, file_sha256, require_space, write_json, write_text

pytestmark = pytest.mark.usefixtures("real_fsync")


def staged(out, resume=False, identity="job"):
    return Staging(out, resume, identity)


def test_write_replaces_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": 2})
    write_json(path, {"b": 3, "a": 2})
    assert path.read_text() == '{\n  "a": 2,\n  "b": 3\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"a\.txt: cannot be written: no space left on the device"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_only_outside_errors_become_ours(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        open(tmp_path / "absent")
    with pytest.raises(ConfigError, match="quota"), disk_errors(tmp_path):
        raise OSError(errno.EDQUOT, "")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, (8 << 20) - 1, 8 << 20, (8 << 20) + 5])
def test_large_file_has_exactly_the_bytes(tmp_path, size):
    data = os.urandom(size)
    path = tmp_path / "large"
    with LargeFile(path) as file:
        for start in range(0, size, 3_000_001):
            file.write(data[start : start + 3_000_001])
    assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["large"]


def test_large_file_after_an_error_has_no_final_name(tmp_path):
    def interrupted():
        with LargeFile(tmp_path / "large") as file:
            file.write(b"x")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not (tmp_path / "large").exists()


def test_space_names_both_figures(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ConfigError, match=r"no space left: 1000000000\.000 GB are needed, \d+\.\d+ GB are available"):
        require_space(tmp_path / "not" / "yet", 10**18)


def test_final_name_appears_only_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as staging:
        write_text(staging.folder / "a", "1")
        (staging.scratch / "w").write_text("2")
        assert not out.exists()
        staging.finish()
    assert os.listdir(out) == ["a"]
    assert os.listdir(out.parent) == ["out"]


def test_existing_output_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with staged(out) as staging:
        staging.finish()
    (out / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty.*Remove it or choose another"):
        staged(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        staged(tmp_path / "file")
    assert (out / "mine").read_text() == "kept"


def unfinished(out, identity="job"):
    """What a killed run leaves: one finished file."""
    staging = staged(out, identity=identity)
    path = staging.folder / "a"
    write_text(path, "finished")
    staging.record("a", {"sha256": file_sha256(path), "bytes": 8})
    os.close(staging._lock_handle)
    return staging


def test_unfinished_run_needs_resume_and_the_same_job(tmp_path):
    out = tmp_path / "out"
    left = unfinished(out)
    with pytest.raises(ConfigError, match="unfinished run.*--resume"):
        staged(out)
    with pytest.raises(ConfigError, match="left by another job"):
        staged(out, resume=True, identity="other")
    with staged(out, resume=True) as staging:
        assert staging.finished("a")["bytes"] == 8
        assert staging.finished("b") is None
    assert left.folder.exists()


def test_what_the_journal_does_not_list_is_gone_on_resume(tmp_path):
    left = unfinished(tmp_path / "out")
    (left.folder / "b").write_text("whole, but nobody said so")
    (left.folder / ".manifest.json.tmp").write_text("cut sh")
    with staged(tmp_path / "out", resume=True) as staging:
        assert os.listdir(staging.folder) == ["a"]


def test_changed_file_is_not_believed(tmp_path):
    left = unfinished(tmp_path / "out")
    (left.folder / "a").write_text("finishes")
    with staged(tmp_path / "out", resume=True) as staging:
        assert staging.finished("a") is None


def test_killed_before_the_first_or_after_the_last_file_starts_anew(tmp_path):
    left = unfinished(tmp_path / "out")
    os.rename(left.folder, tmp_path / "elsewhere")
    with staged(tmp_path / "out", identity="new job") as staging:
        assert staging.finished("a") is None


def test_foreign_folder_is_not_touched(tmp_path):
    partial = storage.partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match=r"'thesis\.txt', not ours"):
        staged(tmp_path / "out", resume=True)
    assert (partial / "thesis.txt").exists()


def failing(out, finished):
    """A run that writes one file, notes what is `finished`, and fails."""
    with staged(out) as staging:
        write_text(staging.folder / "a", "1")
        for name, record in finished.items():
            staging.record(name, record)
        raise KeyError


def test_failure_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        failing(tmp_path / "out", finished={})
    assert os.listdir(tmp_path) == []


def test_failure_later_keeps_what_is_finished(tmp_path):
    with pytest.raises(KeyError):
        failing(tmp_path / "out", finished={"a": {"sha256": "", "bytes": 1}})
    journal = storage.partial_folder(tmp_path / "out") / "journal.json"
    assert json.loads(journal.read_text())["finished"].keys() == {"a"}


def test_two_processes_exclude_each_other(tmp_path):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    partial = storage.partial_folder(tmp_path / "out")
    partial.mkdir()
    command = [sys.executable, "-c", holder, str(partial / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is writing it"):
            staged(tmp_path / "out")
        other.communicate("\n")
    with staged(tmp_path / "out") as staging:
        staging.finish()
