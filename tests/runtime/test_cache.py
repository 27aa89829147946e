"""The kernel cache: right content in any case, never a part of a file, never somebody else's."""

from __future__ import annotations

import inspect
import linecache
import multiprocessing
import os
import stat
import time

import pytest

from effattn import settings
from effattn.runtime import cache

SOURCE = f"{cache.HEADER}: exact\nanswer = 42\n" + "# more\n" * 2000


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(settings, "_told", set())


@pytest.fixture
def kernels(tmp_path):
    return tmp_path / "cache" / "kernels"


def test_writes_and_creates_private_directories(kernels):
    path = cache.keep_source("a.py", SOURCE)
    assert path == kernels / "a.py"
    assert path.read_text() == SOURCE
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert stat.S_IMODE(kernels.parent.stat().st_mode) == 0o700
    assert os.listdir(kernels) == ["a.py"]  # no temporary file is left


def test_the_directories_are_private_under_any_umask(kernels):
    old = os.umask(0)
    try:
        path = cache.keep_source("a.py", SOURCE)
    finally:
        os.umask(old)
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_good_file_is_not_written_again(kernels):
    path = cache.keep_source("a.py", SOURCE)
    os.utime(path, (1, 1))
    cache.keep_source("a.py", SOURCE)
    assert path.stat().st_mtime == 1


@pytest.mark.parametrize(
    "content",
    [b"", SOURCE.encode()[:100], SOURCE.encode() + b"x", b"import os\n", b"\xff\x00"],
    ids=["empty", "truncated", "longer", "foreign", "binary"],
)
def test_a_wrong_file_is_replaced(kernels, content):
    path = cache.keep_source("a.py", SOURCE)
    path.write_bytes(content)
    cache.keep_source("a.py", SOURCE)
    assert path.read_text() == SOURCE


def test_a_link_is_replaced_and_never_followed(kernels, tmp_path):
    kernels.mkdir(parents=True, mode=0o700)
    kernels.parent.chmod(0o700)
    victim = tmp_path / "victim"
    victim.write_text(SOURCE)  # even with the right content behind it
    (kernels / "a.py").symlink_to(victim)
    path = cache.keep_source("a.py", SOURCE + "# new\n")
    assert not path.is_symlink()
    assert path.read_text() == SOURCE + "# new\n"
    assert victim.read_text() == SOURCE


def test_a_pipe_in_the_way_does_not_block(kernels):
    cache.keep_source("b.py", SOURCE)
    os.mkfifo(kernels / "a.py")
    assert cache.keep_source("a.py", SOURCE).read_text() == SOURCE


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.py", "a/b.py", "/a.py", "a\\b", "a\0b", "C:a.py", ".hidden", "x" * 300]
)
def test_names_that_are_not_plain_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="plain file name"):
        cache.keep_source(name, SOURCE)
    assert not (tmp_path / "cache").exists()


def test_a_directory_that_others_may_write_to_is_not_used(kernels):
    kernels.parent.mkdir()
    kernels.parent.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"written to by others.*chmod 700"):
        path = cache.keep_source("a.py", SOURCE)
    assert not path.exists()
    assert cache.entries() == ()
    assert cache.clear() == 0
    assert "others" in cache.problem()


def test_the_inner_directory_is_checked_too(kernels):
    cache.keep_source("a.py", SOURCE)
    kernels.chmod(0o770)
    with pytest.warns(RuntimeWarning, match="written to by others"):
        assert not cache.keep_source("b.py", SOURCE).exists()


def test_somebody_elses_directory_is_not_used(kernels, monkeypatch):
    cache.keep_source("a.py", SOURCE)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert not cache.keep_source("b.py", SOURCE).exists()
    assert cache.entries() == ()


def test_a_file_where_the_directory_should_be(kernels):
    kernels.parent.parent.mkdir(exist_ok=True)
    kernels.parent.write_text("not a directory")
    with pytest.warns(RuntimeWarning, match="not a directory"):
        cache.keep_source("a.py", SOURCE)
    assert kernels.parent.read_text() == "not a directory"


def test_a_path_below_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFATTN_CACHE_DIR", str(tmp_path / "file" / "deeper"))
    with pytest.warns(RuntimeWarning, match="EFFATTN_CACHE_DIR"):
        cache.keep_source("a.py", SOURCE)
    assert cache.entries() == ()


@pytest.mark.parametrize("function", ["mkdir", "replace"])
def test_a_read_only_directory_works_and_warns_once(kernels, monkeypatch, function, recwarn):
    if function == "replace":
        cache.keep_source("a.py", "old")

    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, function, refuse)
    for number in range(3):
        path = cache.keep_source("a.py", SOURCE + str(number))
        assert path == kernels / "a.py"
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 1
    assert "Read-only file system" in messages[0]
    if function == "replace":
        assert os.listdir(kernels) == ["a.py"]  # the temporary file is gone
        assert path.read_text() == "old"


def test_python_reads_the_held_text_and_not_the_file(kernels):
    path = cache.keep_source("a.py", "def answer():\n    return 42\n")
    namespace: dict = {}
    exec(compile("def answer():\n    return 42\n", str(path), "exec"), namespace)
    path.write_text("def answer():\n    return 'attack'\n")
    linecache.checkcache(str(path))
    assert inspect.getsource(namespace["answer"]) == "def answer():\n    return 42\n"


def test_entries_tell_ours_from_others(kernels, tmp_path):
    cache.keep_source("a.py", SOURCE)
    (kernels / "foreign.py").write_text("print(1)")
    (kernels / "link.py").symlink_to(kernels / "a.py")
    (kernels / "folder").mkdir()
    os.utime(kernels / "a.py", (time.time() - 100, time.time() - 100))
    found = {entry.name: entry for entry in cache.entries()}
    assert {name: entry.ours for name, entry in found.items()} == {"a.py": True, "foreign.py": False, "link.py": False}
    assert found["a.py"].size == len(SOURCE)
    assert 99 < found["a.py"].age < 200


def test_clear_removes_only_ours(kernels, tmp_path):
    for name in ("a.py", "b.py"):
        cache.keep_source(name, SOURCE)
    outside = tmp_path / "outside.py"
    outside.write_text(SOURCE)
    (kernels / "foreign.py").write_text("print(1)")
    (kernels / "link.py").symlink_to(outside)
    (kernels / ".effattn-busy").write_text("half a f")
    (kernels / ".effattn-dead").write_text("half a f")
    os.utime(kernels / ".effattn-dead", (1, 1))
    assert cache.clear() == 3
    assert sorted(os.listdir(kernels)) == [".effattn-busy", "foreign.py", "link.py"]
    assert outside.exists()
    assert cache.clear() == 0


def test_an_absent_cache_is_empty(kernels):
    assert cache.entries() == ()
    assert cache.clear() == 0
    assert cache.problem() is None
    assert not kernels.parent.exists()  # looking creates nothing


def _write_often(texts):
    for text in texts:
        cache.keep_source("shared.py", text)


def test_many_processes_never_show_a_part(kernels):
    texts = [f"{cache.HEADER} {number}\n" + str(number) * 200_000 for number in range(4)]
    cache.keep_source("shared.py", texts[0])
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(texts[i:] + texts[:i],)) for i in range(4) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add((kernels / "shared.py").read_text())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= set(texts)
    assert os.listdir(kernels) == ["shared.py"]
