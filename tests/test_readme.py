"""The Python blocks of the README and of docs/delta.md run, as one program each; tables say what the code says."""

import re
from pathlib import Path

import pytest

import kvkernels as kk

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DELTA = (ROOT / "docs" / "delta.md").read_text(encoding="utf-8")
BLOCKS = [
    (f"{name} block {i}", block)
    for name, text in (("README.md", README), ("docs/delta.md", DELTA))
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two top lines."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_there_are_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_block_runs(name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_format_table() -> None:
    """Bits per element are counted in bytes of a page of 64 tokens and 128 channels."""
    table = {row[0]: row for row in rows("Formats")}
    assert set(table) == {f.k for f in kk.formats()}
    for fmt in kk.formats():
        assert float(table[fmt.k][2]) == pytest.approx(fmt.bits_per_element(64, 128), abs=5e-4)


def test_op_table() -> None:
    listed = {name for row in rows("Ops") for name in re.findall(r"\w+", row[0])}
    folder = ROOT / "python" / "kvkernels" / "ops"
    assert {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")} <= listed
    assert all(hasattr(kk, name) for name in listed)
