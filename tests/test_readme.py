"""The commands and the code of README.md, run as they stand there, on the small model in place of a large one."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from bridgeport.cli import VERBS, main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path, held_out_picture: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the checkpoint and the picture that the README talks of."""
    from bridgeport.models.small import checkpoint_path

    shutil.copytree(checkpoint_path(), tmp_path / "blip2-opt-2.7b")
    shutil.copy(held_out_picture, tmp_path / "cat.jpg")  # Pillow goes by content, not by name
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    """Those of blocks without a language: what needs pictures of one's own, or a GPU, stands in `text` blocks."""
    blocks = [block for language, block in BLOCKS if not language]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("bridgeport ")]
    return [shlex.split(line)[1:] for line in lines]


def test_the_shell_commands_work(desk: Path) -> None:
    ran = commands()
    assert [words[0] for words in ran] == ["export", "inspect", "parity", "run"]
    for words in ran:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(words) == 0, words
        assert out.getvalue()
    assert (desk / "parity.html").stat().st_size > 1000


def test_the_python_code_works(desk: Path) -> None:
    (code,) = [block for language, block in BLOCKS if language == "python"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().strip()


def test_the_table_of_verbs_is_that_of_the_program() -> None:
    assert re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE) == list(VERBS)
