"""Presets: the most bits that fit, for any page."""

import pytest

import kvkernels as kk
from kvkernels.presets import PRESETS

pytestmark = pytest.mark.once


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_preset_fits_and_the_next_wider_one_does_not(page_size: int, head_dim: int) -> None:
    sizes = [kk.format(name).bits_per_element(page_size, head_dim) for name in PRESETS]
    assert sizes == sorted(sizes, reverse=True)
    for name, bits in zip(PRESETS, sizes):
        assert kk.preset(bits, page_size, head_dim) == kk.format(name)
    for wider, name in zip(sizes, PRESETS[1:]):
        assert kk.preset(wider - 0.001, page_size, head_dim) == kk.format(name)


def test_fewer_bits_than_any_preset_has() -> None:
    with pytest.raises(ValueError, match=r"bits must be at least 1\.59375, those of m31/b1\.e5m3 .*; got 1$"):
        kk.preset(1)
