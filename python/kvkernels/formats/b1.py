"""b1: rotated, the sign and one fp16 scale per token and 128 channels. 1.125 bits per element at D = 128."""

from kvkernels.formats._grid import MidRise, TokenCodes

NAME = "b1"
NUMBER = 7
BITS = 1
PACKED = True
ROTATED = True
KEYS_ONLY = False
PARTS = 1

_side = TokenCodes(MidRise(1))
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
