"""The formats that cost a model least at their bits."""

from kvkernels.formats import Format, format

# By falling bits: each was the best measured at its own, by perplexity (python -m bench.accuracy).
PRESETS = ("bf16", "u8", "u4", "m42/u2.e5m3", "m42/t1.e5m3", "m31/u2.e5m3", "m31/t1.e5m3", "m31/b1.e5m3")


def preset(bits: float, page_size: int = 64, head_dim: int = 128) -> Format:
    """The format to begin with at no more than `bits` bits per element, scales and padding counted.

    With pages of 64 and head_dim 128: from 16 bf16, from 8.125 u8, from 4.125 u4, from 2.59375 m42/u2.e5m3, from
    2.40625 m42/t1.e5m3, from 2.09375 m31/u2.e5m3, from 1.90625 m31/t1.e5m3, from 1.59375 m31/b1.e5m3. At head_dim 64
    scales weigh more: 2.6875, 2.5, 2.1875, 2, 1.6875.

    Keys want their transform (`calibrate_keys`), and the first tokens want 16 bits: KVCache keeps those, the cache for
    transformers does both. Measured on one model of 135M parameters; which format is best at given bits is a property
    of the model too. ValueError: fewer bits than any preset has, or pages that it cannot have.
    """
    for name in PRESETS:
        fmt = format(name)
        if fmt.bits_per_element(page_size, head_dim) <= bits:
            return fmt
    least = fmt.bits_per_element(page_size, head_dim)
    raise ValueError(
        f"preset: bits must be at least {least:g}, those of {fmt.name} with pages of {page_size} and head_dim "
        f"{head_dim}; got {bits:g}"
    )
