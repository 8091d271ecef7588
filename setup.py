"""setuptools -> CMake -> one op library without Python symbols, kvkernels/libkvkernels.so.

KVKERNELS_CUDA        auto (default) | on | off; auto: where torch is a CUDA build, nvcc is found and there are kernels
KVKERNELS_CUDA_ARCHS  CMake's CUDA_ARCHITECTURES, e.g. "80-real;90a-real"
KVKERNELS_BUILD_DIR   build tree, build/release unless told
CMAKE_ARGS, CMAKE_BUILD_TYPE, MAX_JOBS as usual
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402


def tool(name: str) -> str:
    """A build tool of this environment, which need not be activated, or of PATH."""
    found = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if not found:
        sys.exit(f"kvkernels: {name} not found; install it with: {sys.executable} -m pip install {name}")
    return found


def torch_dir() -> Path:
    # Found, not imported: an import takes seconds, and only the headers and the link directory are wanted.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            f"kvkernels: building needs torch >= 2.10 in {sys.executable}\n"
            "(with pip's --no-build-isolation install torch first; without it pip fetches the newest)"
        )
    return Path(spec.origin).parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], py_limited_api=True)


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python tag: no Python ABI

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = Path(os.environ.get("KVKERNELS_BUILD_DIR", ROOT / "build" / "release")).resolve()
        cmake, ninja = tool("cmake"), tool("ninja")
        args = [
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            # Always said again: the environment that pip builds in is gone next time, and with it a path in the cache.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DKVKERNELS_TORCH_DIR={torch_dir()}",
            f"-DKVKERNELS_CUDA={os.environ.get('KVKERNELS_CUDA', 'auto')}",
        ]
        if archs := os.environ.get("KVKERNELS_CUDA_ARCHS"):
            args.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        environment = {**os.environ, **(cuda_toolkit.environment() or {})}
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "--log-level=NOTICE", *args],
            [cmake, "--build", str(tree), "-j", jobs],
        ):
            if subprocess.run(command, env=environment).returncode:
                sys.exit(f"kvkernels: failed: {shlex.join(command)}")
        # One tree serves the checkout and the wheel, so the library is copied to where it is wanted.
        package.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(tree / "libkvkernels.so"), str(package / "libkvkernels.so"))


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: native code, and nothing that depends on a Python ABI."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def run(self) -> None:
        # A module that is gone from the source must not come back from an earlier build.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[CMakeExtension("kvkernels.libkvkernels")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
