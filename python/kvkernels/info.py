"""What is installed: `kk.info()` as a dict, `print(kk.info())` and `python -m kvkernels` as tables."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kvkernels._library import LIBRARY
from kvkernels.formats import CODECS, format
from kvkernels.ops import OPS

PAGE_SIZE, HEAD_DIM = 64, 128  # of the bits per element in the table


class Info(dict[str, Any]):
    """A dict that prints as tables."""

    def __str__(self) -> str:
        lines = [
            f"kvkernels {self['kvkernels']}   torch {self['torch']}   Python {self['python']}   {self['machine']}",
            f"library   {self['library']}",
            f"CPU       {self['isa']} in use ({' '.join(self['isas'])} run here; KVKERNELS_ISA forces one), "
            f"{self['threads']} threads",
            f"CUDA      {'yes' if self['cuda'] else 'not in this build'}",
            "",
        ]
        names = list(self["formats"])
        header = ["op", "backends", "dtypes", *names]
        rows = [
            [
                op,
                " ".join(has["backends"]),
                " ".join(has["dtypes"]),
                *("x" if name in has["formats"] else "" for name in names),
            ]
            for op, has in self["ops"].items()
        ]
        bits = [f"{f['bits_per_element']:.4g}" for f in self["formats"].values()]
        rows.append([f"bits per element (page {PAGE_SIZE}, D {HEAD_DIM})", "", "", *bits])
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        table = (header, ["-" * w for w in widths], *rows)
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]
        return "\n".join([*lines, 'Keys and values may differ in format: kk.format("u3", "u2").'])


def info() -> Info:
    """Versions, instruction set, and ops x backends x dtypes x formats.

    Bits per element count codes, scales and padding, at page_size 64 and head_dim 128.
    """
    build = json.loads(torch.ops.kvkernels.build_info())
    try:
        own = version("kvkernels")
    except PackageNotFoundError:
        own = "(not installed)"
    backends = ("cpu", "cuda")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return Info(
        kvkernels=own,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        library=str(LIBRARY),
        isa=build["isa"],
        isas=build["isas"],
        threads=torch.get_num_threads(),
        cuda=build["cuda"],
        asserts=build["assert"],
        compiler=build["compiler"],
        formats={
            name: {
                "number": codec.NUMBER,
                "rotated": codec.ROTATED,
                "bits_per_element": format(name).bits_per_element(PAGE_SIZE, HEAD_DIM),
            }
            for name, codec in CODECS.items()
        },
        ops={
            name: {
                "backends": [b for b in backends if has_kernel(f"kvkernels::{name}", b.upper())],
                "dtypes": [str(t).removeprefix("torch.") for t in op.DTYPES],
                "formats": list(op.FORMATS),
            }
            for name, op in OPS.items()
        },
    )
