"""What is installed: `kk.info()` as a dict, `print(kk.info())` and `python -m kvkernels` as tables."""

import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from kvkernels import __version__
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
            f"CUDA      {self['cuda'] or 'not in this build (KVKERNELS_CUDA=on builds it)'}"
            + ("; this build runs the CUDA kernels on the CPU, in the emulator" if self["simt"] else ""),
            "",
        ]
        formats = self["formats"]
        ops = [
            (op, backend, " ".join(dtypes), _choice(has["formats"], list(formats)))
            for op, has in self["ops"].items()
            for backend, dtypes in has["backends"].items()
        ]
        lines += [*_table(("op", "backend", "dtypes", "formats"), ops), ""]
        bits = f"bits per element (page {PAGE_SIZE}, D {HEAD_DIM})"
        sides = [
            (name, f"{f['bits_per_element']:.4f}".rstrip("0").rstrip("."), "keys" if f["keys_only"] else "keys, values")
            for name, f in formats.items()
        ]
        lines += _table(("format", bits, "of"), sides)
        return "\n".join([*lines, 'Keys and values may differ in format: kk.format("u3", "u2").'])


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = (header, tuple("-" * w for w in widths), *rows)
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]


def _choice(some: list[str], every: list[str]) -> str:
    """Of the formats: all, all but a few, or those."""
    missing = [name for name in every if name not in some]
    if not some or len(missing) > len(some):
        return " ".join(some)
    return "all but " + " ".join(missing) if missing else "all"


def _names(dtypes: tuple[torch.dtype, ...]) -> list[str]:
    return [str(t).removeprefix("torch.") for t in dtypes]


def _bits(name: str) -> float:
    if CODECS[name].KEYS_ONLY:
        return CODECS[name].side_bytes("k", PAGE_SIZE, HEAD_DIM) * 8 / (PAGE_SIZE * HEAD_DIM)
    return format(name).bits_per_element(PAGE_SIZE, HEAD_DIM)


def info() -> Info:
    """Versions, instruction set, and ops x backends x dtypes x formats.

    Bits per element count codes, scales and padding, at page_size 64 and head_dim 128; formats for keys alone count
    keys.
    """
    build = json.loads(torch.ops.kvkernels.build_info())
    return Info(
        kvkernels=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        library=str(LIBRARY),
        isa=build["isa"],
        isas=build["isas"],
        threads=torch.get_num_threads(),
        cuda=build["cuda"],  # architectures, as CMake names them; None: no CUDA kernels
        simt=build["simt"],
        asserts=build["assert"],
        compiler=build["compiler"],
        formats={
            name: {
                "number": codec.NUMBER,
                "rotated": codec.ROTATED,
                "keys_only": codec.KEYS_ONLY,
                "bits_per_element": _bits(name),
            }
            for name, codec in CODECS.items()
        },
        ops={
            name: {
                "backends": {
                    "cpu": _names(op.DTYPES),
                    **({"cuda": _names(getattr(op, "CUDA_DTYPES", op.DTYPES))} if build["cuda"] else {}),
                },
                "formats": [format(pair).k for pair in op.FORMATS],
            }
            for name, op in OPS.items()
        },
    )
