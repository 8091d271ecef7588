"""u2.e5m3: u2 with scales of 8 bits, e5m3: fp16 without its sign, 3 bits of mantissa. 2.0625 bits at D = 128."""

from kvkernels.formats._grid import MidRise, ScaleE5M3, TokenCodes

NAME = "u2.e5m3"
NUMBER = 9
BITS = 2
PACKED = True
ROTATED = True
KEYS_ONLY = False
PARTS = 1

_side = TokenCodes(MidRise(2), ScaleE5M3)
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
