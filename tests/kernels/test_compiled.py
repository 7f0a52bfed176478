"""What is compiled is kept on disk, and never outlives the source it was made from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm_sec.kernels import compiled

INNER = "from compiled import compiled\n\n\n@compiled\ndef inner():\n    return {}\n"
OUTER = "from compiled import compiled\nfrom inner import inner\n\n\n@compiled\ndef outer():\n    return 10 * inner()\n"
CALL = "from outer import outer; print(outer(), sum(outer.stats.cache_hits.values()))"


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of kernels: `outer` calls `inner`, which gives 1."""
    shutil.copy(compiled.__file__, tmp_path / "compiled.py")
    (tmp_path / "inner.py").write_text(INNER.format(1))
    (tmp_path / "outer.py").write_text(OUTER)
    return tmp_path


def call(folder: Path, **env: str) -> tuple[str, str]:
    """What `outer()` gives in a new process and how often it was found on disk, and what was said."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_CACHE")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", CALL], cwd=folder, env={**kept, **env}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_a_kernel_is_compiled_once_and_again_when_one_that_it_imports_changes(kernels):
    assert call(kernels)[0] == "10 0"
    assert call(kernels)[0] == "10 1"
    stamp = (kernels / "inner.py").stat()
    (kernels / "inner.py").write_text(INNER.format(2))
    os.utime(
        kernels / "inner.py", ns=(stamp.st_atime_ns, stamp.st_mtime_ns)
    )  # same size, same time: only the text tells
    assert call(kernels)[0] == "20 0"
    assert call(kernels)[0] == "20 1"


def test_without_a_home_in_a_folder_that_cannot_be_written_kernels_work_and_say_that_they_are_not_kept(kernels):
    (kernels / "__pycache__").write_text("")  # a file where the folder would be: root cannot write there either
    nowhere = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    for _ in range(2):
        said, told = call(kernels, **nowhere)
        assert said == "10 0"
        assert told.count("Set NUMBA_CACHE_DIR") == 1
    assert call(kernels, **nowhere, NUMBA_CACHE_DIR=str(kernels / "kept"))[0] == "10 0"
    assert call(kernels, **nowhere, NUMBA_CACHE_DIR=str(kernels / "kept"))[0] == "10 1"


def test_a_user_without_any_home_gets_no_folder_named_tilde(kernels, monkeypatch):
    """A container whose user is not in /etc/passwd: there expanduser("~") is "~"."""
    monkeypatch.chdir(kernels)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert not compiled._nowhere(kernels)  # beside the source it can be kept
    monkeypatch.setattr("os.access", lambda path, mode: "kept" in str(path))
    assert compiled._nowhere(kernels)
    (kernels / "kept").mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(kernels / "kept"))
    assert not compiled._nowhere(kernels)
