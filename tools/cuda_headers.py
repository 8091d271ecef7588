"""Prints the folder that holds CUDA's headers (cuda_fp16.h and what it includes). No toolkit and no GPU are needed.

    python tools/cuda_headers.py

Looked for in this order: CUDA_HOME, CUDA_PATH, the toolkit of nvcc on PATH, /usr/local/cuda, and this interpreter's
packages nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl (7 MB), all in nvidia/cu13.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

NEEDED = ("cuda_fp16.h", "crt/host_defines.h", "nv/target")  # one file of each package


def include_dir() -> Path | None:
    homes = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parent.parent)
    homes.append(Path("/usr/local/cuda"))
    homes += sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*"), reverse=True)
    includes = (home / "include" for home in homes)
    return next((i for i in includes if all((i / name).is_file() for name in NEEDED)), None)


if __name__ == "__main__":
    found = include_dir()
    if found is None:
        sys.exit(
            "kvkernels: CUDA's headers not found; install a toolkit or: "
            f"{sys.executable} -m pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
        )
    print(found)
