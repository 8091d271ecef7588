"""Everything that a machine with a GPU can show, in one go: tests, compute-sanitizer, bench page.

    python tools/gpu_check.py [--quick]

Needs torch with CUDA, pytest, hypothesis and numpy, and a library with CUDA kernels: python/kvkernels/libkvkernels.so
or KVKERNELS_LIBRARY, built here (`make build CUDA=on`) or carried along: it does not depend on the Python. No internet
and no compiler are needed. Exits non-zero without a GPU and at the first step that fails.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = ["contract", "formats", "properties", "errors", "kv_cache", "calibrate", "sparse", "cuda"]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# A few cases of each op: formats of all kinds, two caches, several partial results of a sequence.
SANITIZED = "test_matches_reference and (transform or strided or NHD or HND or split_tokens or merge_states or gap)"


def stop(message):
    sys.exit("gpu-check: " + message)


def step(name, command, environment):
    print(f"==== {name}", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment)
    print(f"==== {name}: {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        stop(f"{name} failed with {done.returncode}")


def check_machine():
    missing = [m for m in ("torch", "pytest", "hypothesis", "numpy") if importlib.util.find_spec(m) is None]
    if missing:
        stop(f"{sys.executable} lacks {', '.join(missing)}")
    import torch

    if not torch.cuda.is_available():
        stop(f"torch {torch.__version__} sees no GPU; nothing was checked")
    sys.path.insert(0, str(ROOT / "python"))
    import kvkernels

    info = kvkernels.info()
    print(info, flush=True)
    if not info["cuda"]:
        stop(f"{info['library']} has no CUDA kernels: `make build CUDA=on`, or name another in KVKERNELS_LIBRARY")
    print(f"GPU       {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short bench, and the sanitizer's memcheck only")
    args = parser.parse_args()
    check_machine()
    environment = {
        **os.environ,
        "KVKERNELS_TEST_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")])),
    }
    pytest = [sys.executable, "-m", "pytest", "-q"]
    step("tests", [*pytest, *(f"tests/test_{name}.py" for name in SUITE)], environment)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in TOOLS[:1] if args.quick else TOOLS:
        if sanitizer is None:
            print(f"==== {tool}: not run, there is no compute-sanitizer", flush=True)
            continue
        # torch's allocator hands out parts of large blocks; one block per tensor shows reads past an end.
        alone = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        if tool == "initcheck":
            command += ["--kernel-regex", "kns=kk"]  # torch's own kernels may read what they then mask
        step(tool, [*command, *pytest, "tests/test_contract.py", "-k", SANITIZED], alone)
    step("bench", [sys.executable, "-m", "bench.gpu", "--results", *(["--quick"] if args.quick else [])], environment)


if __name__ == "__main__":
    main()
