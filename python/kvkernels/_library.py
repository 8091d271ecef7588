"""Loads libkvkernels.so, which registers the ops with torch."""

import os
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)


def _load() -> Path:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise ImportError(
            f"kvkernels needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} (its stable ABI); found {torch.__version__}"
        )
    named = os.environ.get("KVKERNELS_LIBRARY")
    path = Path(named) if named else Path(__file__).with_name("libkvkernels.so")
    if not path.is_file():
        raise ImportError(
            f"KVKERNELS_LIBRARY={named}: no such file"
            if named
            else f"{path} is missing: build it with `pip install .` (or `make`) in the source tree, "
            "or name a built one in KVKERNELS_LIBRARY"
        )
    torch.ops.load_library(str(path))
    # The instruction set is chosen at the first use; asking now makes a bad KVKERNELS_ISA an error of the import.
    torch.ops.kvkernels.build_info()
    return path


LIBRARY = _load()
