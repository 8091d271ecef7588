"""Prepares or checks the Python environment that the Makefile works in. Standard library only, any Python 3.

    python tools/env.py create .venv --torch torch==2.13.0 [group ...]   a virtual environment with what the groups need
    python tools/env.py check [group ...]                                says what this interpreter's environment lacks

Groups are the extras of pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stop(message):
    sys.exit("kvkernels: " + message)


def version(text):
    """The leading numbers of a version, for comparing."""
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def check_machine():
    if sys.version_info < (3, 10):
        stop(f"needs Python >= 3.10; {sys.executable} is {sys.version.split()[0]} (or: make PYTHON=/path/to/python)")
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(c) for c in named or ("c++", "g++", "clang++")):
        what = f"CXX={named[0]}" if named else "c++, g++ or clang++"
        stop(f"needs a C++17 compiler; {what} not found (Debian: apt-get install g++)")


def requirements(groups):
    """What building takes and what the groups take, from pyproject.toml; no tomllib before Python 3.11."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = []
    for key in ["requires", *groups]:
        listed = re.search(rf"^{key} = \[(.*?)\]", text, re.M | re.S)
        if not listed:
            stop(f"pyproject.toml has no group {key}")
        found += [r for r in re.findall(r'"([^"]+)"', listed[1]) if not r.startswith("torch>")]
    return list(dict.fromkeys(found))


def create(folder, torch, groups):
    check_machine()
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        try:
            import ensurepip  # noqa: F401
            import venv  # noqa: F401
        except ImportError:
            stop("this Python has no venv (Debian: apt-get install python3-venv; or: make PYTHON=/path/to/python)")
        print(f"kvkernels: creating {folder} with Python {sys.version.split()[0]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # torch first and alone: its pin must decide before anything else can ask for "some torch".
    for wanted in ([torch], requirements(groups)):
        if wanted:
            print("kvkernels: installing " + " ".join(wanted), flush=True)
            command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wanted]
            if subprocess.run(command).returncode:
                stop("failed: " + " ".join(command))


def check(groups):
    check_machine()
    from importlib import metadata

    def installed(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    torch = installed("torch")
    if torch is None or version(torch) < (2, 10):
        stop(f"needs torch >= 2.10 in {sys.executable}; it has {torch or 'none'}")
    missing = []
    for requirement in requirements(groups):
        name, least = re.fullmatch(r"([\w-]+)(?:[>=]=([\d.]+).*)?", requirement).groups()
        if name in ("cmake", "ninja") and shutil.which(name):
            continue
        have = installed(name)
        if have is None or (least and version(have) < version(least)):
            missing.append(requirement)
    if missing:
        quoted = " ".join(f"'{m}'" for m in missing)
        stop(f"{sys.executable} lacks what this needs; install it with\n  {sys.executable} -m pip install {quoted}")


def main(args):
    if args[:1] == ["create"] and len(args) >= 4 and args[2] == "--torch":
        create(args[1], args[3], args[4:])
    elif args[:1] == ["check"]:
        check(args[1:])
    else:
        stop(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
