"""u3: rotated, 3-bit mid-rise codes, one fp16 scale per token and 128 channels. 3.125 bits per element at D = 128."""

from kvkernels.formats._grid import MidRise, TokenCodes

NAME = "u3"
NUMBER = 4
BITS = 3
PACKED = True
ROTATED = True
KEYS_ONLY = False
PARTS = 1

_side = TokenCodes(MidRise(3))
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
