"""u8: rotated, 8-bit mid-rise codes, one fp16 scale per token and 128 channels. 8.125 bits per element at D = 128."""

from kvkernels.formats._midrise import TokenCodes

NAME = "u8"
NUMBER = 2
BITS = 8
PACKED = True
ROTATED = True

_side = TokenCodes(BITS)
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
