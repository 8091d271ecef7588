"""The wheel: its tag and content, life in environments of other Pythons and torches, and that nothing stays behind.

KVKERNELS_TEST_PYTHONS  interpreters whose torch (>= 2.10) the wheel is tried with, separated by ":"
KVKERNELS_TEST_TORCH    a version of torch to fetch for another Python than this one; unset by default: gigabytes
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
FETCH_SECONDS = 240

SMOKE = """
import pathlib, sys
import torch
import kvkernels as kk
assert str(pathlib.Path(kk.__file__)).startswith(sys.prefix), kk.__file__
torch.manual_seed(0)
B, L, Hq, Hkv, D, S = 2, 100, 8, 2, 128, 64
pages = -(-L // S)
k, v, q = torch.randn(B * L, Hkv, D), torch.randn(B * L, Hkv, D), torch.randn(B, Hq, D)
table = torch.arange(B * pages, dtype=torch.int32).view(B, pages)
slots = (torch.arange(B)[:, None] * pages * S + torch.arange(L)).flatten()
lens = torch.full((B,), L, dtype=torch.int32)
for name, tolerance in (("bf16", 0.02), ("u8", 0.03), ("u4", 0.2), ("u2", 0.8)):
    kv = kk.PagedKV.empty(name, B * pages, Hkv, D, S)
    kk.write_kv(k, v, kv, 0, slots)
    out = kk.quant_attention(q, kv, table, lens)
    kr, vr = (t.view(B, L, Hkv, D).transpose(1, 2).repeat_interleave(Hq // Hkv, 1) for t in (k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], kr, vr)[:, :, 0]
    error = ((out - exact).norm() / exact.norm()).item()
    assert error < tolerance, (name, error)
print("smoke ok:", sys.version.split()[0], torch.__version__, kk.info())
"""


def run(*command: "str | Path", timeout: float = 300, cwd: "Path | None" = None) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KVKERNELS_LIBRARY"))}
    # Lent packages must not leave byte code of their own behind; what pip installs it compiles all the same.
    environment = {**clean, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", folder, ROOT]
    run(sys.executable, *build, timeout=900)
    (found,) = folder.glob("*.whl")
    return found


def environment(folder: Path, python: "str | Path") -> Path:
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def site(python: "str | Path") -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def lend_torch(python: Path, lender: "str | Path") -> None:
    """Links what the lender has installed, but for kvkernels, into the environment of `python`; nothing is copied."""
    torch = run(lender, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)").strip()
    own = site(python)
    for entry in Path(torch).parent.parent.iterdir():
        if not re.match(r"__editable__|kvkernels|pip\b|__pycache__", entry.name) and not (own / entry.name).exists():
            (own / entry.name).symlink_to(entry)


def files(python: Path) -> set[str]:
    folder = python.parent.parent
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "pip" not in p.relative_to(folder).parts}


def install_smoke_uninstall(python: Path, wheel: Path, smoke: bool = True) -> None:
    before = files(python)
    # Without an index: the torch that is there must satisfy the wheel.
    run(python, "-m", "pip", "install", "-q", "--no-index", *([] if smoke else ["--no-deps"]), wheel)
    assert files(python) > before
    if smoke:  # -I ignores the environment, hence -B
        assert "smoke ok" in run(python, "-IB", "-c", SMOKE, cwd=wheel.parent)
        assert "kvkernels" in run(python, "-IB", "-m", "kvkernels", cwd=wheel.parent)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "kvkernels")
    assert files(python) == before


def other_pythons() -> list[str]:
    """CPython >= 3.10 with venv, of another version than this one: PATH, and pyenv where that is used."""
    names = [f"python3.{minor}" for minor in range(10, 16)]
    candidates = [path for name in names if (path := shutil.which(name))]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip()
        candidates += sorted(map(str, Path(root).glob("versions/3.*/bin/python3")))
    found = {sys.version_info[:2]: ""}
    for candidate in candidates:
        code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            version = tuple(map(int, done.stdout.split()))
            if version >= (3, 10):
                found.setdefault(version, candidate)
    return [found[v] for v in sorted(found) if found[v]]


def test_wheel(wheel: Path) -> None:
    assert re.fullmatch(r"kvkernels-[\w.]+-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    source = {p.relative_to(ROOT / "python").as_posix() for p in (ROOT / "python" / "kvkernels").rglob("*.py")}
    packed = {n for n in names if ".dist-info/" not in n}
    assert packed == source | {"kvkernels/libkvkernels.so", "kvkernels/py.typed"}
    assert any(n.endswith("LICENSE") for n in names)
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata


def test_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", sys.executable)
    lend_torch(python, sys.executable)
    install_smoke_uninstall(python, wheel)


@pytest.mark.skipif(not other_pythons(), reason="no other CPython >= 3.10 with venv on PATH")
def test_other_pythons_take_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Without torch, which would be gigabytes: the tag fits, the same files come and go."""
    for i, interpreter in enumerate(other_pythons()):
        install_smoke_uninstall(environment(tmp_path / str(i), interpreter), wheel, smoke=False)


@pytest.mark.skipif(not os.environ.get("KVKERNELS_TEST_PYTHONS"), reason="KVKERNELS_TEST_PYTHONS names no interpreter")
def test_named_pythons(wheel: Path, tmp_path: Path) -> None:
    for i, interpreter in enumerate(os.environ["KVKERNELS_TEST_PYTHONS"].split(":")):
        python = environment(tmp_path / str(i), interpreter)
        lend_torch(python, interpreter)
        install_smoke_uninstall(python, wheel)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "env"
    shutil.rmtree(tmp_path / "env", ignore_errors=True)  # gigabytes, and pytest keeps what is left


@pytest.mark.skipif(not os.environ.get("KVKERNELS_TEST_TORCH"), reason="KVKERNELS_TEST_TORCH names no torch to fetch")
def test_other_python_and_torch(wheel: Path, folder: Path) -> None:
    interpreters = other_pythons()
    if not interpreters:
        pytest.skip("no other CPython >= 3.10 with venv on PATH")
    version = os.environ["KVKERNELS_TEST_TORCH"]
    python = environment(folder, interpreters[-1])
    try:
        # Byte code of all of torch takes 15 s, and what the smoke test imports of it 2.
        run(python, "-m", "pip", "install", "-q", "--no-compile", f"torch=={version}", timeout=FETCH_SECONDS)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        why = str(error)[-300:]  # pip's warnings come first
        pytest.skip(f"torch {version} could not be had for {interpreters[-1]} within {FETCH_SECONDS} s: {why}")
    install_smoke_uninstall(python, wheel)
