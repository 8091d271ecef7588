"""m31: keys only, halves of the channels rotated apart, codes of 3 and 1 bits, 8-bit scales. 2.125 bits at D = 128."""

from kvkernels.formats._grid import MidRise, ScaleE5M3, TokenCodes
from kvkernels.formats._halves import Halves

NAME = "m31"
NUMBER = 12
BITS = 2
PACKED = True
ROTATED = True
KEYS_ONLY = True
PARTS = 2

_side = Halves(TokenCodes(MidRise(3), ScaleE5M3), TokenCodes(MidRise(1), ScaleE5M3))
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
