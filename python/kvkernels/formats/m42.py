"""m42: keys only, halves of the channels rotated apart, codes of 4 and 2 bits, 8-bit scales. 3.125 bits at D = 128."""

from kvkernels.formats._grid import MidRise, ScaleE5M3, TokenCodes
from kvkernels.formats._halves import Halves

NAME = "m42"
NUMBER = 13
BITS = 3
PACKED = True
ROTATED = True
KEYS_ONLY = True
PARTS = 2

_side = Halves(TokenCodes(MidRise(4), ScaleE5M3), TokenCodes(MidRise(2), ScaleE5M3))
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
