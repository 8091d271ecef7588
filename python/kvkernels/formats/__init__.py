"""Formats: how a page stores K and V.

A page is `page_size` tokens of one KV head: [K codes | K scales | V codes | V scales], padded to 64 bytes. One module
per format defines one side of it in plain PyTorch, float32, bit for bit what the kernels write; the folder is the list.
This file joins two sides to a page and applies the basis a format stores its numbers in.
"""

import importlib
import pkgutil
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kvkernels.formats._hadamard import fwht, fwht_scale

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
PACKED_HEAD_DIMS = (64, 128, 256)
PAGE_ALIGN = 64  # bytes
PACKED_PAGE_MULTIPLE = 16  # tokens


class Codec(Protocol):
    """What a format's module has. side is "k" or "v"; x is fp32 [..., page_size, head_dim] in the stored basis."""

    NAME: str
    NUMBER: int  # of formats.def: written into files, never reused
    BITS: float
    PACKED: bool
    ROTATED: bool
    KEYS_ONLY: bool  # values cannot be stored so
    PARTS: int  # of the channels, rotated apart

    def whole_pages(self, side: str) -> bool: ...
    def side_bytes(self, side: str, page_size: int, head_dim: int) -> int: ...
    def encode(self, side: str, x: Tensor, page_size: int) -> Tensor: ...
    def decode(self, side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor: ...
    def token_bytes(self, side: str, token: int, page_size: int, head_dim: int) -> Tensor: ...


def _discover() -> dict[str, Codec]:
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    found = [cast(Codec, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {c.NAME: c for c in sorted(found, key=lambda c: c.NUMBER)}


CODECS: dict[str, Codec] = _discover()


def codec(name: str) -> Codec:
    """The module of a format, by name."""
    if not isinstance(name, str):
        raise TypeError(f"a format is named by a str; got {type(name).__name__}")
    if name not in CODECS:
        raise ValueError(f'unknown format "{name}"; known formats: {", ".join(CODECS)}')
    return CODECS[name]


class Format(NamedTuple):
    """How the keys and how the values of a page are stored: the names of two formats. Made by `format`."""

    k: str
    v: str

    @property
    def name(self) -> str:
        """ "u2", or "u3/u2" where keys and values differ; `format` takes either back."""
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def code(self) -> int:
        """k number | v number << 8: the format as the ops take it."""
        return CODECS[self.k].NUMBER | CODECS[self.v].NUMBER << 8

    @property
    def packed(self) -> bool:
        """Whether a side is coded (page sizes are then multiples of 16), rather than both being 16-bit numbers."""
        return CODECS[self.k].PACKED or CODECS[self.v].PACKED

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head dims a page can have."""
        return PACKED_HEAD_DIMS if self.packed else HEAD_DIMS

    @property
    def rotated_k(self) -> bool:
        """Whether keys are stored as H diag(balance) (k - centre)."""
        return CODECS[self.k].ROTATED

    @property
    def rotated_v(self) -> bool:
        """Whether values are stored as H v."""
        return CODECS[self.v].ROTATED

    @property
    def whole_pages(self) -> bool:
        """Whether a side is coded across the tokens of its page, so that only pack_pages can write it."""
        return CODECS[self.k].whole_pages("k") or CODECS[self.v].whole_pages("v")

    def page_bytes(self, page_size: int, head_dim: int) -> int:
        """Bytes of one page of one KV head, padding included."""
        self.check(page_size, head_dim)
        return -(-self.data_bytes(page_size, head_dim) // PAGE_ALIGN) * PAGE_ALIGN

    def data_bytes(self, page_size: int, head_dim: int) -> int:
        """page_bytes without the padding."""
        return self.v_offset(page_size, head_dim) + CODECS[self.v].side_bytes("v", page_size, head_dim)

    def v_offset(self, page_size: int, head_dim: int) -> int:
        """Where the V side begins in a page."""
        return CODECS[self.k].side_bytes("k", page_size, head_dim)

    def bits_per_element(self, page_size: int, head_dim: int) -> float:
        """Bits of memory per number stored, codes, scales and padding counted."""
        return self.page_bytes(page_size, head_dim) * 8 / (2 * page_size * head_dim)

    def check(self, page_size: int, head_dim: int) -> None:
        """ValueError if the format cannot have such pages."""
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1; got {page_size}")
        if self.packed and page_size % PACKED_PAGE_MULTIPLE:
            raise ValueError(
                f"page_size must be a multiple of {PACKED_PAGE_MULTIPLE} for a packed format; got {page_size} "
                f"with format {self.name}"
            )
        if head_dim not in self.head_dims:
            kind = "a packed format" if self.packed else "a 16-bit format"
            raise ValueError(
                f"head_dim must be one of {', '.join(map(str, self.head_dims))} for {kind}; got {head_dim} "
                f"with format {self.name}"
            )


def format(k: str | Format, v: str | None = None) -> Format:
    """The format of a page by name.

    format("u2")        keys and values in u2
    format("u3", "u2")  keys in u3, values in u2; format("u3/u2") is the same
    A Format passes through. ValueError: an unknown name (lists the known ones); values in a format for keys alone.
    """
    if isinstance(k, Format):
        if v is not None:
            raise TypeError(f"format takes a Format or two names; got {k!r} and {v!r}")
        k, v = k
    elif isinstance(k, str) and v is None and "/" in k:
        k, v = k.split("/", 1)
    values = codec(k if v is None else v)
    if values.KEYS_ONLY:
        raise ValueError(
            f'{values.NAME} is a format for keys; name one for the values too, as in format("{codec(k).NAME}", "u2")'
        )
    return Format(codec(k).NAME, values.NAME)


def formats() -> tuple[Format, ...]:
    """All formats in the order of their numbers, keys and values alike; those for keys alone with values in u2. Any of
    them for keys and any that is not for keys alone for values make a pair for `format`."""
    return tuple(Format(name, "u2" if c.KEYS_ONLY else name) for name, c in CODECS.items())


# The basis: centre and balance [..., head_dim], order int [..., head_dim] or None; numbers are [..., tokens, head_dim].
Transform = tuple[Tensor | None, ...]


def to_stored(
    side: str,
    x: Tensor,
    name: str,
    centre: Tensor | None = None,
    balance: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Numbers as the user has them -> as the format stores them: H (diag(balance) (k - centre))[order], H v, or as is.

    In x's dtype; exact to the bit in float32. centre, balance and order [..., head_dim] without the token dim, keys
    only. Formats of one part take channels as they come; those of two rotate each half of them by itself.
    """
    c = codec(name)
    if not c.ROTATED:
        return x
    if side == "k" and centre is not None:
        x = x - centre.to(x).unsqueeze(-2)
    if side == "k" and balance is not None:
        x = x * balance.to(x).unsqueeze(-2)
    if side == "k" and order is not None and c.PARTS > 1:
        x = x.gather(-1, order.long().unsqueeze(-2).expand_as(x))
    return _rotated(x, c.PARTS)


def from_stored(
    side: str,
    x: Tensor,
    name: str,
    centre: Tensor | None = None,
    balance: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The way back of to_stored."""
    c = codec(name)
    if not c.ROTATED:
        return x
    x = _rotated(x, c.PARTS)
    if side == "k" and order is not None and c.PARTS > 1:
        x = x.gather(-1, order.long().argsort(-1).unsqueeze(-2).expand_as(x))
    if side == "k" and balance is not None:
        x = x / balance.to(x).unsqueeze(-2)
    if side == "k" and centre is not None:
        x = x + centre.to(x).unsqueeze(-2)
    return x


def _rotated(x: Tensor, parts: int) -> Tensor:
    n = x.shape[-1] // parts
    scale = n**-0.5 if x.dtype == torch.float64 else fwht_scale(n)
    return torch.cat([fwht(part, scale) for part in x.chunk(parts, -1)], -1)


def encode_page(fmt: Format, k: Tensor, v: Tensor, transform: Transform | None = None) -> Tensor:
    """Pages from keys and values [..., page_size, head_dim] (any float dtype): uint8 [..., page_bytes].

    transform: (centre, balance[, order]), each [..., head_dim] with k's leading dims or fewer: [Hkv, D] where k is
    [..., Hkv, page_size, D].
    """
    page_size, head_dim = k.shape[-2:]
    sides = []
    for side, x, name in (("k", k, fmt.k), ("v", v, fmt.v)):
        stored = to_stored(side, x.float(), name, *(transform or ()))
        sides.append(codec(name).encode(side, stored, page_size))
    page = torch.cat(sides, -1)
    return torch.nn.functional.pad(page, (0, fmt.page_bytes(page_size, head_dim) - page.shape[-1]))


def decode_page(
    fmt: Format,
    data: Tensor,
    page_size: int,
    head_dim: int,
    transform: Transform | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Pages uint8 [..., page_bytes] -> k, v [..., page_size, head_dim] as the user had them.

    The stored numbers are exact in float32; the basis is undone in `dtype`: float32 is what read_kv computes, bit for
    bit, float64 is for references.
    """
    offset, end = fmt.v_offset(page_size, head_dim), fmt.data_bytes(page_size, head_dim)
    sides = []
    for side, part, name in (("k", data[..., :offset], fmt.k), ("v", data[..., offset:end], fmt.v)):
        stored = codec(name).decode(side, part, page_size, head_dim)
        sides.append(from_stored(side, stored.to(dtype), name, *(transform or ())))
    return sides[0], sides[1]
