"""The allocator that a program starts with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agrl_jax.runtime import memory

SCRIPT = """
import os, sys
from pathlib import Path
from agrl_jax.runtime import memory
memory._PAGES = Path(sys.argv[1])
memory.with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


def pages(folder: Path, text: str) -> Path:
    file = folder / "enabled"
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]"])
def test_where_the_kernel_does_not_wait_to_be_asked_nothing_is_set(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(memory, "_PAGES", pages(tmp_path, text))
    assert memory.tunables() == {}
    monkeypatch.setattr(memory, "_PAGES", tmp_path / "no such file")
    assert memory.tunables() == {}


@pytest.mark.skipif(not memory.platform.libc_ver()[0], reason="the C library is not glibc")
@pytest.mark.parametrize("own", [None, "glibc.malloc.arena_max=2"])
def test_a_program_starts_again_as_the_same_process_and_the_users_settings_stay(
    own: str | None, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if own:
        environment["GLIBC_TUNABLES"] = own
    command = [sys.executable, "-c", SCRIPT, str(pages(tmp_path, "always [madvise] never")), "one", "two words"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    said = process.communicate()[0]
    assert said == f"{process.pid} {own or 'glibc.malloc.hugetlb=1'} ['one', 'two words']\n"
