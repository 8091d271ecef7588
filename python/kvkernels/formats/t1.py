"""t1: rotated, ternary, five codes to a byte, one fp16 scale per token and 128 channels. 1.75 bits at D = 128."""

from kvkernels.formats._grid import Ternary, TokenCodes

NAME = "t1"
NUMBER = 8
BITS = 1.6
PACKED = True
ROTATED = True
KEYS_ONLY = False
PARTS = 1

_side = TokenCodes(Ternary())
whole_pages = _side.whole_pages
side_bytes = _side.side_bytes
encode = _side.encode
decode = _side.decode
token_bytes = _side.token_bytes
