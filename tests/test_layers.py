"""The house rules that a compiler does not check: who includes whom, and what the objects and the library hold.

python -> bind -> include/ops <- cpu, cuda -> include/{formats,core}
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("KVKERNELS_BUILD_DIR", ROOT / "build" / "release"))
C_HEADERS = {"climits", "cstdint", "cstddef", "cmath", "cstring"}
TORCH = re.compile(r"torch/|ATen/|c10/|aten/")
ISAS = ("base", "avx2", "avx512", "avx512vnni")


def sources(folder: str) -> list[Path]:
    found = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".h", ".def", ".cpp", ".cu", ".cuh")]
    return sorted(found)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def offenders(folder: str, allowed: "re.Pattern[str]") -> list[str]:
    return [
        f"{path.relative_to(ROOT)} includes {name}"
        for path in sources(folder)
        for name in includes(path)
        if name not in C_HEADERS and not allowed.match(name)
    ]


# A header at the top of include/kvkernels joins formats to what both backends take; ops/ builds on those.
@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("include/kvkernels/core", r"kvkernels/core/"),
        ("include/kvkernels/formats", r"kvkernels/core/"),
        ("include/kvkernels/ops", r"kvkernels/(delta|exec|pool|format|plan_node|score|summary)\.h$"),
        ("include/kvkernels", r"kvkernels/"),
        ("csrc/cpu", r"kvkernels/|cpu/|(immintrin|cpuid|sched)\.h$|(cstdlib|new|stdexcept|string)$"),
        (
            "csrc/cuda",
            r"kvkernels/|cuda/|cuda_(fp16|bf16|runtime)\.h$|simt(_ptx)?\.h$|(algorithm|stdexcept|string|type_traits|utility)$",
        ),
    ],
)
def test_includes(folder: str, allowed: str) -> None:
    assert offenders(folder, re.compile(allowed)) == []


def test_only_bind_includes_torch() -> None:
    outside = [p for top in ("include", "csrc", "tests/cpp") for p in sources(top) if "bind" not in p.parts]
    assert [str(p) for p in outside if any(TORCH.match(name) for name in includes(p))] == []
    bind = [name for p in sources("csrc/bind") for name in includes(p)]
    assert any(TORCH.match(name) for name in bind)
    assert [name for name in bind if name.startswith(("cpu/simd", "cuda/"))] == []


@pytest.mark.parametrize(
    ("what", "pattern", "allowed"),
    [
        ("inline PTX", r"\basm\b", {"csrc/cuda/ptx.cuh"}),
        ("launches", r"<<<", {"csrc/cuda/launch.cuh"}),
        ("shared memory", r"\b__shared__\b", {"csrc/cuda/launch.cuh"}),
        ("the CUDA runtime", r"\bcuda(?!xx)[A-Z]\w*\(|cuda_runtime", {"csrc/cuda/launch.cuh"}),
        ("the emulator", r"\bKK_SIMT\b", {f"csrc/{f}" for f in ("cuda/launch.cuh", "cuda/ptx.cuh", "bind/simt.h")}),
    ],
)
def test_what_the_emulator_replaces_stands_in_one_place(what: str, pattern: str, allowed: set[str]) -> None:
    found = {
        str(p.relative_to(ROOT))
        for top in ("include", "csrc/bind", "csrc/cuda")
        for p in sources(top)
        if re.search(pattern, re.sub(r"//.*", "", p.read_text()))
    }
    assert found == allowed, what


def test_every_op_has_both_backends() -> None:
    ops = {p.stem for p in sources("include/kvkernels/ops")}
    assert ops <= {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")}
    assert ops <= {p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")}


def test_headers_stand_alone(tmp_path: Path) -> None:
    """Each header compiles by itself, so that the order of includes never matters."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    assert compiler, "no C++ compiler"
    every = tmp_path / "every.cpp"
    for header in sources("include"):
        if header.suffix == ".def":
            continue
        every.write_text(f'#include "{header.relative_to(ROOT / "include")}"\n')
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(ROOT / "include")]
        done = subprocess.run([*command, str(every)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def nm(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, symbol) as in the file, without symbol versions."""
    text = subprocess.run(["nm", "-P", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [(fields[1], fields[0].split("@")[0]) for line in text.splitlines() if len(fields := line.split()) > 1]


def objects(isa: str) -> list[Path]:
    return sorted((BUILD / "CMakeFiles" / f"cpu_{isa}.dir").rglob("*.o"))


@pytest.mark.skipif(not BUILD.exists(), reason=f"no build tree at {BUILD}: `make build` writes one")
@pytest.mark.parametrize("isa", ISAS)
def test_symbols_of_an_isa_stay_in_its_namespace(isa: str) -> None:
    """Else the linker may keep the AVX-512 copy of an inline function for all, and an older machine dies of SIGILL."""
    if isa == "base":
        assert objects(isa), f"no objects of {isa} under {BUILD}"
    # kk::cpu holds the dispatchers, which only the base object defines
    spaces = [isa, "cpu"] if isa == "base" else [isa]
    mangled = "|".join(f"{len(s)}{s}" for s in spaces)
    ours = re.compile(rf"_Z(Z|GV|GVZ|TI|TS|TV|TT)?N[KVRO]*2kk({mangled})")
    stray = {
        f"{path.name}: {name}"
        for path in objects(isa)
        for kind, name in nm(path, "--defined-only", "--extern-only")
        if not ours.match(name) and not name.startswith("DW.ref.")
    }
    assert stray == set()


CUDA_OBJECTS = sorted((BUILD / "CMakeFiles" / "cuda_kernels.dir").rglob("*.o"))


@pytest.mark.skipif(not CUDA_OBJECTS, reason=f"no CUDA objects under {BUILD}: `make cuda` looks at its own")
def test_symbols_of_cuda_stay_in_their_namespace() -> None:
    """Else the linker may keep the copy of an inline function that another compiler made."""
    # nvcc's host side of a kernel that is no template is global, under a name that holds the kernel's own
    ours = re.compile(r"_Z((Z|GV|GVZ|TI|TS|TV|TT)?N[KVRO]*2kk(4cuda|6device)|\d+__device_stub__ZN2kk4cuda)")
    names = {name for path in CUDA_OBJECTS for _, name in nm(path, "--defined-only", "--extern-only")}
    assert {name for name in names if "2kk" in name and not ours.match(name)} == set()


@pytest.fixture(scope="module")
def library() -> Path:
    import kvkernels

    default = Path(kvkernels.__file__).with_name("libkvkernels.so")
    return Path(os.environ.get("KVKERNELS_LIBRARY") or default)


def test_library_knows_no_python(library: Path) -> None:
    wanted = [name for _, name in nm(library, "-D", "--undefined-only")]
    assert [name for name in wanted if re.match(r"_?Py[A-Z_]", name)] == []


def test_library_exports_nothing(library: Path) -> None:
    """Ops register themselves when the library is loaded; an exported symbol could only collide with somebody's."""
    assert nm(library, "-D", "--defined-only") == []


def test_library_needs_only_torch_and_the_system(library: Path) -> None:
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    # libtorch.so is an empty umbrella that brings libtorch_cuda.so into reach in CUDA builds of torch
    assert needed[:3] == ["libstdc++.so.6", "libtorch.so", "libtorch_cpu.so"]
    assert {n for n in needed[3:] if not n.startswith("ld-linux")} <= {"libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    assert not re.search(r"\((RPATH|RUNPATH)\)", text)


def test_library_names_no_build_path(library: Path) -> None:
    assert str(ROOT).encode() not in library.read_bytes()
