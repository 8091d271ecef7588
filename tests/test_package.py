"""The package as a whole: its names, its version, its types in files of weights."""

import io
import re
from pathlib import Path

import pytest
import torch

import kvkernels as kk
from kvkernels.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.once


def test_names() -> None:
    """Every op, every name that a document uses, and nothing else."""
    assert set(OPS) <= set(kk.__all__)
    assert [name for name in kk.__all__ if not hasattr(kk, name)] == []
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    used = {name for path in documents for name in re.findall(r"\bkk\.([a-zA-Z]\w*)", path.read_text())}
    assert used - {"h"} <= set(kk.__all__)
    assert {name for name in dir(kk) if not name.startswith("__")} == set(kk.__all__)


def test_one_version() -> None:
    setuptools = pytest.importorskip("setuptools.config.pyprojecttoml")
    project = setuptools.read_configuration(ROOT / "pyproject.toml")["project"]
    assert kk.__version__ == kk.info()["kvkernels"] == project["version"]


def test_weights_only_files() -> None:
    kv = kk.PagedKV.empty("m31/u2", 2, 2, 64, 16, transform=kk.KVTransform(torch.zeros(2, 64), torch.ones(2, 64)))
    lens = torch.ones(1, dtype=torch.int32)
    saved = {
        "kv": kv,
        "summaries": kk.page_summaries(kv, lens[:, None] - 1, lens),
        "plan": kk.plan_decode(lens),
        "offloaded": kk.offload(kv, 0, 1, 1, 1)[1],
        "context": kk.delta_context(*torch.rand(2, 1, 3, 2, 16), None),
        "layout": kk.TokenLayout(lens, lens, lens, lens),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert {name: type(x) for name, x in loaded.items()} == {name: type(x) for name, x in saved.items()}
    assert loaded["kv"].formats == kv.formats
    assert torch.equal(loaded["kv"].transform.balance, kv.transform.balance)
