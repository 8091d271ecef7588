"""Builds the roofline probe (bench/native) for this machine into build/bench: `python -m bench.build`."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "bench" / "native"
MODULE = "kvkernels_limits"


def cpu_text(key: str) -> str:
    """One field of /proc/cpuinfo ("model name", "flags"); empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def cpu_name() -> str:
    return cpu_text("model name") or platform.processor() or platform.machine()


def find_cmake() -> str | None:
    beside = Path(sys.executable).parent / "cmake"
    return str(beside) if beside.exists() else shutil.which("cmake")


def target() -> Path:
    """Where the module belongs: the name carries what it was built from and for, so a stale one is never loaded."""
    text = cpu_text("flags") + "".join(p.read_text() for p in sorted(NATIVE.iterdir()))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return ROOT / "build" / "bench" / digest / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))


def build(verbose: bool = False) -> Path:
    path = target()
    if path.exists():
        return path
    try:
        import pybind11
    except ImportError:
        raise SystemExit("bench: the roofline probe needs pybind11 (`make bench` installs it)") from None
    cmake = find_cmake()
    if cmake is None:
        raise SystemExit("bench: the roofline probe needs cmake (`make bench` installs it)")
    print("bench: building the roofline probe for this machine (once)", file=sys.stderr, flush=True)
    tree = path.parent / "cmake"
    steps = [
        [cmake, "-S", str(NATIVE), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
         f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={path.parent}"],
        [cmake, "--build", str(tree)],
    ]  # fmt: skip
    for step in steps:
        done = subprocess.run(step, stdout=None if verbose else subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"bench: `{' '.join(step)}` failed\n{done.stdout or ''}")
    return path


def load() -> ModuleType:
    path = build()
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(verbose="-v" in sys.argv).relative_to(ROOT))
