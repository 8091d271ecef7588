"""Instructions of the attention kernel per element of K and V, counted in its machine code, as a page.

    python tools/instructions.py [--arch 90a] [--write FILE]

Needs nvcc and nvdisasm (on PATH, or from PyPI: nvidia-cuda-nvdisasm); no GPU. Compiles for some minutes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "attention_kernelILi128ELi1ELb1ELb0E"  # D 128, up to 8 query rows, packed formats
TOKENS, CHANNELS, LANES = 16, 128, 32
UNPACK = ("LOP3", "HFMA2", "PRMT", "SHF")
BITS = {"u8": 8.125, "u4": 4.125, "u3": 3.125, "u2": 2.125, "b1": 1.125, "kivi2": 2.75}
HALVES = "m42 m31 m21"  # one loop for their keys, with branches
# H100 SXM: bytes per second, SMs, clock, lane instructions per clock and SM; from its data sheet
BANDWIDTH, SMS, CLOCK, ISSUE = 3.35e12, 132, 1.755e9, 128
SHARE = 0.85


class Loop(NamedTuple):
    side: str
    format: str
    instructions: int
    unpack: int
    mma: int


def nvdisasm() -> str:
    folders = sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*/bin"))
    found = shutil.which("nvdisasm") or next((str(p) for f in folders if (p := f / "nvdisasm").is_file()), None)
    return found or sys.exit("kvkernels: nvdisasm not found; pip install nvidia-cuda-nvdisasm")


def disassemble(arch: str) -> str:
    compiler = cuda_toolkit.nvcc() or sys.exit(
        "kvkernels: nvcc not found (tools/cuda_toolkit.py says where it is looked for)"
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/attention.cubin"
        target = f"arch=compute_{arch},code=sm_{arch}"
        include = ("-I", str(ROOT / "include"), "-I", str(ROOT / "csrc"), "-DKK_ISA=device")
        source = str(ROOT / "csrc" / "cuda" / "attention_packed.cu")
        subprocess.run(
            [compiler, "-std=c++17", "-O3", *include, "-gencode", target, "-cubin", "-o", cubin, source], check=True
        )
        done = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True)
    return next(part for part in re.split(r"\n\.text\.", done.stdout) if KERNEL in part.partition("\n")[0])


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def inner_loops(code: str) -> list[Counter[str]]:
    """Instructions of every loop that multiplies matrices and holds no other that does."""
    ops: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(ops)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            ops.append(opcode(instruction[1]))
            target = re.search(r"\.L_x_\d+", instruction[1])
            if ops[-1] == "BRA" and target and target[0] in labels:  # known already: it goes back
                loops.append((labels[target[0]], len(ops)))
    loops = [(a, b) for a, b in loops if "HMMA" in ops[a:b]]
    return [
        Counter(ops[a:b])
        for a, b in loops
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    ]  # fmt: skip


def named(ops: Counter[str]) -> Loop:
    """Each format unpacks 16 x 128 numbers in its own way; V's loops transpose the weights (MOVM)."""
    pairs = ops["HFMA2"]
    if pairs == 0:
        form = "b1"
    elif pairs >= 64:
        form = "u8" if ops["PRMT"] >= 48 else "kivi2"
    elif pairs >= 40:
        form = HALVES
    else:
        form = "u3" if ops["LOP3"] >= 60 else "u4" if ops["SHF"] >= 12 else "u2"
    side = "V" if ops["MOVM"] else "K"
    return Loop(side, form, sum(ops.values()), sum(ops[op] for op in UNPACK), ops["HMMA"])


def page(arch: str, loops: list[Loop]) -> str:
    by = {(loop.side, loop.format): loop for loop in loops}
    if len(by) != len(loops) or set(by) != {("K", HALVES), *((side, form) for side in "KV" for form in BITS)}:
        sys.exit(f"kvkernels: the loops of the kernel are not those of the formats any more: {loops}")
    lines = [
        "# Instructions of quant_attention per element",
        "",
        "Written by `python tools/instructions.py --write bench/results/instructions.md`: "
        f"sm_{arch}, D 128, up to 8 query rows per KV",
        "head, counted in the loops over 16 tokens of one KV head. What a page costs once besides (copy, entry,",
        "the maximum of its scores; trits to 2-bit codes, which take u2's loops) is not in here; the second product",
        f"of rotated float16 queries is, which bfloat16 ones skip. Keys of two halves ({HALVES}) take a loop with",
        "branches, which cannot be counted so. Nothing was measured on hardware.",
        "",
        "The last column is what an SM may issue per element while an H100 reads at "
        f"{SHARE:.0%} of its {BANDWIDTH / 1e12} TB/s:",
        f"{ISSUE} lanes a clock, {SMS} SMs, {CLOCK / 1e9} GHz.",
        "",
        "| format | bits per element | K, per 16 tokens | V, per 16 tokens | of both to unpack | mma "
        "| lane instructions per element | at most |",
        "|" + "---|" * 8,
    ]
    for form, bits in BITS.items():
        k, v = by["K", form], by["V", form]
        per_element = (k.instructions + v.instructions) * LANES / (2 * TOKENS * CHANNELS)
        most = ISSUE * SMS * CLOCK / (BANDWIDTH * SHARE * 8 / bits)
        lines.append(
            f"| {form} | {bits} | {k.instructions} | {v.instructions} | {k.unpack + v.unpack} | {k.mma + v.mma} "
            f"| {per_element:.2f} | {most:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = page(options.arch, [named(ops) for ops in inner_loops(disassemble(options.arch))])
    if options.write:
        options.write.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
