"""t1.e5m3: t1 with scales of 8 bits, e5m3: fp16 without its sign, 3 bits of mantissa. 1.6875 bits at D = 128."""

from kvkernels.formats._grid import ScaleE5M3, Ternary, TokenCodes

NAME = "t1.e5m3"
NUMBER = 10
BITS = 1.6
PACKED = True
ROTATED = True
KEYS_ONLY = False
PARTS = 1

_side = TokenCodes(Ternary(), ScaleE5M3)
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
