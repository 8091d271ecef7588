"""What the machine can do, sampled between the runs that it limits."""

from __future__ import annotations

from pathlib import Path

from bench import build

# A page's heads on both sides in 16 bits at 8 heads of 128: 64 tokens in one place, and 16 tokens of K or of V.
SCATTERED_KB = (256, 32)
BITS = {"base": 128, "avx2": 256, "avx512": 512, "avx512vnni": 512}


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=32 * 2**20)


class Limits:
    """Rates in bytes or operations per second on a number of threads, for the vector width of an ISA."""

    def __init__(self, isa: str) -> None:
        self.native = build.load()
        self.isa = isa
        # Reading it also empties the caches of what ran before. Of 4 times the last cache a tenth more was read a
        # second than of 16 or 32 times: what is left in the cache must not count.
        self.memory = self.native.Limits(max(128 * 2**20, 16 * last_level_cache()))

    def read(self, threads: int) -> float:
        return self.memory.read(threads)

    def read_scattered(self, threads: int, block: int) -> float:
        """Blocks of so many bytes in random order, the best of some ways to ask for them ahead."""
        return self.memory.read_scattered(threads, block)

    def copy(self, threads: int, size: int = 0) -> float:
        """Of `size` bytes; all that it has where that is 0 or more than that."""
        whole = self.memory.bytes
        return self.memory.copy(threads, max(2**16, size) if 0 < size < whole // 2 else whole)

    def fma(self, threads: int) -> float:
        return self.native.fma(threads, BITS[self.isa])

    def bf16(self, threads: int) -> float:
        """Products of bf16 pairs where the machine has them, else the FMA rate."""
        return self.native.bf16(threads, BITS[self.isa]) or self.fma(threads)

    def int8(self, threads: int) -> float:
        """Products of bytes where the ISA has them, else the FMA rate."""
        return self.native.int8(threads, BITS[self.isa], self.isa == "avx512vnni") or self.fma(threads)

    def sample(self, threads: int) -> dict[str, float]:
        rates = {name: getattr(self, name)(threads) for name in ("read", "copy", "fma", "bf16", "int8")}
        return rates | {f"read {kb} KB": self.read_scattered(threads, kb * 2**10) for kb in SCATTERED_KB}
