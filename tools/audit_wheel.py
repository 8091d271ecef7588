"""What a wheel asks of a machine: platform tag, Python ABI, torch ABI. Fails when it asks too much.

python tools/audit_wheel.py dist/kvkernels-*.whl
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARY = "kvkernels/libkvkernels.so"
OLDEST_TORCH = "2.10.0"


def run(*command: str) -> str:
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [str(tool) if tool.exists() else command[0], *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"== {' '.join(Path(c).name if '/' in c else c for c in command)}\n{done.stdout.strip()}\n", flush=True)
    if done.returncode:
        sys.exit(f"audit: {command[0]} failed with {done.returncode}")
    return done.stdout


def main(wheel: Path) -> None:
    if not re.fullmatch(r"kvkernels-[^-]+-py3-none-(linux|manylinux\w*)_(x86_64|aarch64)\.whl", wheel.name):
        sys.exit(f"audit: the tag must be py3-none-<platform>; got {wheel.name}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [n for n in archive.namelist() if n.endswith(".so")]
        if libraries != [LIBRARY]:
            sys.exit(f"audit: the wheel must hold {LIBRARY} and no other library; got {libraries}")
        library = archive.extract(LIBRARY, folder)
        size = Path(library).stat().st_size
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {LIBRARY} {size / 1e6:.2f} MB\n")
        shown = run("auditwheel", "show", str(wheel))
        run("abi3audit", "--strict", "--summary", "--assume-minimum-abi3", "3.10", library)
        audited = run("torch-abi-audit", "--check", "torch", "--verbose", library)
    tag = re.search(r"manylinux_2_(\d+)_", shown)
    if not tag:
        sys.exit("audit: auditwheel found no manylinux tag that fits")
    if OLDEST_TORCH not in audited:
        sys.exit(f"audit: the library must load in torch {OLDEST_TORCH}; torch-abi-audit says otherwise")
    print(f"audit: py3-none, manylinux_2_{tag[1]}, torch >= {OLDEST_TORCH}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
