"""What ptxas makes of each kernel, as a table that is checked in: registers, spills, shared memory, occupancy.

    python tools/ptxas_table.py build/cuda                  prints the table of a build
    python tools/ptxas_table.py build/cuda --write FILE     writes it as a page
    python tools/ptxas_table.py build/cuda --check FILE     fails on spills, kernels or architectures that FILE has not

CMake compiles through `tools/ptxas_table.py --compile nvcc ...`, which runs nvcc and keeps what `ptxas -v` says beside
the object, as <object>.ptxas.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Per SM, the same from compute capability 8.0 to 12.0: registers are given to a warp in units of 256.
REGISTERS, REGISTER_UNIT = 65536, 256
WARPS = {"sm_86": 48, "sm_89": 48, "sm_120a": 48}
MAX_WARPS = 64

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


class Kernel(NamedTuple):
    file: str
    name: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int

    @property
    def capability(self) -> int:
        return int(re.sub(r"\D", "", self.arch))

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.name, self.arch

    @property
    def warps(self) -> int:
        """Warps per SM that the registers allow."""
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        return min(REGISTERS // per_warp // 4 * 4, WARPS.get(self.arch, MAX_WARPS))


def compile_and_keep(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    said = done.stderr.splitlines(keepends=True)
    # Lines of ptxas -v, and the indented ones that belong to them.
    mine = [line for line in said if line.startswith("ptxas info") or SPILLS.search(line)]
    sys.stderr.writelines(line for line in said if line not in mine)
    if "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(mine))
    return done.returncode


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short(line) for line in done.stdout.splitlines()]


def short(name: str) -> str:
    """kk::cuda::(anonymous namespace)::k<(kk::DType)1, 128>(Params) -> k<DType 1, 128>"""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    depth = 0
    for i, c in enumerate(name):  # up to the first parenthesis outside <>
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\((\w+(?:::\w+)*)\)(\d+)", r"\1 \2", name)
    name = re.sub(r"\b(?:kk|cuda|device)::", "", name)
    return re.sub(r"\b(\d+)l\b", r"\1", name).replace("> >", ">>")


def read(build: Path) -> list[Kernel]:
    found = []
    for log in sorted(build.rglob("*.ptxas")):
        file = log.name.removesuffix(".ptxas").removesuffix(".o")
        blocks = re.split(r"(?=ptxas info\s*: Compiling entry function)", log.read_text())[1:]
        for block in blocks:
            entry, spills, used = ENTRY.search(block), SPILLS.search(block), USED.search(block)
            if not (entry and spills and used):
                sys.exit(f"ptxas_table: cannot read this in {log}:\n{block}")
            shared = SHARED.search(block)
            stack, stores, loads = map(int, spills.groups())
            smem = int(shared[1]) if shared else 0
            found.append(Kernel(file, entry[1], entry[2], int(used[1]), stores, loads, stack, smem))
    if not found:
        sys.exit(f"ptxas_table: no *.ptxas under {build}: build it with KVKERNELS_CUDA=on")
    named = [k._replace(name=name) for k, name in zip(found, demangle([k.name for k in found]))]
    return sorted(named, key=lambda k: (k.file, k.name, k.capability))


HEAD = "| file | kernel | arch | registers | spilled, bytes stored / loaded | stack | static shared | warps per SM |"


def row(k: Kernel) -> str:
    cells = (
        k.file,
        f"`{k.name}`",
        k.arch,
        k.registers,
        f"{k.spill_stores} / {k.spill_loads}",
        k.stack,
        k.shared,
        k.warps,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def page(kernels: list[Kernel], compiler: str) -> str:
    archs = [k.arch for k in sorted({k.arch: k for k in kernels}.values(), key=lambda k: k.capability)]
    spilling = sum(k.spill_loads > 0 for k in kernels)
    head = f"""\
# What ptxas says of every kernel

Written by `make cuda ARGS=--write`; `make cuda` fails on a spill, a kernel or an architecture that is not in here.
Warps per SM are what registers allow; a launch's block size and dynamic shared memory may allow fewer. Nothing in here
was measured on hardware.

{compiler}; {", ".join(archs)}; {len(kernels)} kernels, {spilling} with spills.

{HEAD}
{re.sub(r"[^|]+", "---", HEAD)}"""
    return "\n".join([head, *map(row, kernels), ""])


def read_page(path: Path) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(file, kernel, arch) -> bytes spilled."""
    found = {}
    for line in path.read_text().splitlines():
        if re.match(r"\| \w+\.cu \|", line):
            cells = [c.strip() for c in line.strip("|").split(" | ")]
            stores, loads = map(int, cells[4].split(" / "))
            found[cells[0], cells[1].strip("`"), cells[2]] = (stores, loads)
    return found


def check(kernels: list[Kernel], path: Path) -> list[str]:
    budget = read_page(path)
    built = {k.arch for k in kernels}
    wrong = [f"{k.key}: not in {path}" for k in kernels if k.key not in budget]
    here = {k.key for k in kernels}
    wrong += [f"{key}: in {path}, but no longer built" for key in budget if key[2] in built and key not in here]
    for k in kernels:
        stores, loads = budget.get(k.key, (k.spill_stores, k.spill_loads))
        if k.spill_stores > stores or k.spill_loads > loads:
            wrong.append(f"{k.key}: spills {k.spill_stores} / {k.spill_loads} bytes, the budget is {stores} / {loads}")
    return wrong


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        sys.exit(compile_and_keep(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    args = parser.parse_args()
    kernels = read(args.build)
    compiler = re.search(r'set\(CMAKE_CUDA_COMPILER_VERSION "([^"]*)"', "".join(
        p.read_text() for p in (args.build / "CMakeFiles").glob("*/CMakeCUDACompiler.cmake")))  # fmt: skip
    text = page(kernels, f"nvcc {compiler[1] if compiler else 'of an unknown version'}")
    if args.write:
        args.write.write_text(text)
    elif args.check:
        wrong = check(kernels, args.check)
        spilling, most = sum(k.spill_loads > 0 for k in kernels), max(k.registers for k in kernels)
        print(f"ptxas: {len(kernels)} kernels, {spilling} with spills, at most {most} registers")
        if wrong:
            sys.exit("\n".join(["ptxas_table:", *wrong, "(make cuda ARGS=--write, and say why in the commit)"]))
    else:
        print(text)


if __name__ == "__main__":
    main()
