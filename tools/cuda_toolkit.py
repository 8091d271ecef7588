"""Prints where CUDA's headers, or its compiler, lie on this machine. No GPU is needed.

    python tools/cuda_toolkit.py headers    the folder of cuda_fp16.h and what it includes
    python tools/cuda_toolkit.py nvcc       the compiler
    eval "$(python tools/cuda_toolkit.py environment)"    what a build with that compiler needs

Looked for in this order: CUDACXX (nvcc), CUDA_HOME, CUDA_PATH, the toolkit of nvcc on PATH, /usr/local/cuda, and this
interpreter's packages from PyPI, which share the folder nvidia/cu13: nvidia-cuda-runtime, -crt and -cccl (7 MB to
download) for the headers, nvidia-cuda-nvcc and nvidia-nvvm too (122 MB) for the compiler. The groups `headers` and
`nvcc` of pyproject.toml pin them.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

NEEDED = ("cuda_fp16.h", "crt/host_defines.h", "nv/target")  # one file of each package


def homes():
    named = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    on_path = [Path(found).resolve().parent.parent for found in (shutil.which("nvcc"),) if found]
    packages = sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*"), reverse=True)
    return [*named, *on_path, Path("/usr/local/cuda"), *packages]


def headers():
    includes = (home / "include" for home in homes())
    return next((i for i in includes if all((i / name).is_file() for name in NEEDED)), None)


def nvcc():
    if named := os.environ.get("CUDACXX"):
        return Path(named)
    return next((c for home in homes() if (c := home / "bin" / "nvcc").is_file()), None)


def environment():
    """Variables for a build. PyPI's packages keep their libraries in lib, where nvcc does not look."""
    compiler = nvcc()
    if compiler is None:
        return None
    libraries = compiler.parent.parent / "lib"
    found = {"CUDACXX": str(compiler)}
    if (libraries / "libcudart_static.a").is_file():
        found["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), os.environ.get("LIBRARY_PATH")]))
    return found


if __name__ == "__main__":
    what = {"headers": headers, "nvcc": nvcc, "environment": environment}
    if len(sys.argv) != 2 or sys.argv[1] not in what:
        sys.exit(__doc__)
    found = what[sys.argv[1]]()
    if found is None:
        group = "headers" if sys.argv[1] == "headers" else "nvcc"
        sys.exit(f"kvkernels: CUDA's {group} not found; install a toolkit, or the group {group} of pyproject.toml")
    if isinstance(found, dict):
        found = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in found.items())
    print(found)
