"""u4: rotated, 4-bit mid-rise codes, one fp16 scale per token and 128 channels. 4.125 bits per element at D = 128."""

from kvkernels.formats._grid import MidRise, TokenCodes

NAME = "u4"
NUMBER = 3
BITS = 4
PACKED = True
ROTATED = True
KEYS_ONLY = False
PARTS = 1

_side = TokenCodes(MidRise(4))
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
