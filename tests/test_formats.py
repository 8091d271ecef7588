"""Formats: the kernels' bytes equal the Python definition, sizes are what was said, errors are those of the grid."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import CODECS, PACKED_HEAD_DIMS, codec, decode_page, encode_page
from kvkernels.formats._hadamard import fwht, fwht_scale, hadamard_matrix

ALL = [f.name for f in kk.formats()]
PACKED = [f.name for f in kk.formats() if f.packed]
BY_TOKEN = [f.name for f in kk.formats() if not f.whole_pages]
PAIRS = ["u3/u2", "u2/kivi2", "bf16/u4", "u8/f16"]
PAGE, HEADS = 16, 2


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """The definition is many small PyTorch ops, slower on more threads; test_contract.py varies the count."""
    threads(1)


def inputs(head_dim: int, page_size: int = PAGE, seed: int = 0) -> dict[str, Tensor]:
    """Kinds of numbers [HEADS, page_size, head_dim], ordinary and hostile."""
    gen = torch.Generator().manual_seed(seed)
    shape = (HEADS, page_size, head_dim)
    x = torch.randn(shape, generator=gen)
    bits = torch.randint(-(2**31), 2**31 - 1, shape, generator=gen).to(torch.int32).view(torch.float32)
    holes = x.clone()
    holes[0, 1, 3], holes[0, 5, -1], holes[1, 7, 0] = float("nan"), float("inf"), -float("inf")
    return {
        "gaussian": x,
        "zero": torch.zeros(shape),
        "zeros of both signs": torch.where(x > 0, 0.0, -0.0),
        "constant": torch.full(shape, 3.3),
        "negative constant": torch.full(shape, -0.1),
        "constant but one": torch.full(shape, 1.0).index_fill_(2, torch.tensor([5]), -7.0),
        "heavy tails": x**9 * 1e3,
        "outliers": torch.where(torch.rand(shape, generator=gen) < 0.02, x * 100, x),
        "half steps": (x * 4).round() / 2,
        "holes": holes,
        "any finite bits": torch.where(bits.isfinite(), bits, x),
        "any bits": bits,
        **{f"times 1e{e}": (x.double() * 10.0**e).float() for e in (-42, -38, -20, -8, -7, -5, 4, 5, 19, 30, 38)},
    }


def transform_of(head_dim: int) -> kk.KVTransform:
    gen = torch.Generator().manual_seed(head_dim)
    centre, spread = torch.randn(2, HEADS, head_dim, generator=gen)
    return kk.KVTransform(centre * 3, torch.exp(spread))


def same_bytes(got: Tensor, expected: Tensor, kinds: list[str], fmt: kk.Format, head_dim: int) -> None:
    """pages [kinds, heads, page_bytes]; says which kind of number, side and byte differ."""
    if torch.equal(got, expected):
        return
    kind, head, byte = (got != expected).nonzero()[0].tolist()
    side = "K" if byte < fmt.v_offset(PAGE, head_dim) else "V"
    count = (got != expected).any(-1).any(-1).sum().item()
    raise AssertionError(
        f"{fmt.name}: {count} of {len(kinds)} kinds differ, first {kinds[kind]!r}, head {head}, side {side}: "
        f"byte {byte} is {got[kind, head, byte]}, not {expected[kind, head, byte]}"
    )


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("head_dim", PACKED_HEAD_DIMS)
@pytest.mark.parametrize("name", BY_TOKEN + PAIRS)
def test_write_kv_writes_the_defined_bytes(name: str, head_dim: int, transformed: bool) -> None:
    fmt = kk.format(name)
    transform = transform_of(head_dim) if transformed else None
    kinds = inputs(head_dim)
    k, v = torch.stack(list(kinds.values())), torch.stack(list(inputs(head_dim, seed=1).values()))
    kv = kk.PagedKV.empty(fmt, len(kinds), HEADS, head_dim, PAGE, transform=transform)
    slots = torch.arange(len(kinds) * PAGE).flip(0)
    rows = [x.transpose(1, 2).flatten(0, 1).flip(0) for x in (k, v)]
    kk.write_kv(*rows, kv, 0, slots)
    same_bytes(kv.pools[0], encode_page(fmt, k, v, transform), list(kinds), fmt, head_dim)

    got = kk.read_kv(kv, 0, slots)
    for side, back in zip(decode_page(fmt, kv.pools[0], PAGE, head_dim, transform), got):
        torch.testing.assert_close(
            back, side.transpose(1, 2).flatten(0, 1).flip(0), rtol=0, atol=0, equal_nan=True, msg=f"read_kv of {name}"
        )


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("head_dim", PACKED_HEAD_DIMS)
@pytest.mark.parametrize("name", ALL + PAIRS + ["kivi2/u2"])
def test_pack_pages_writes_the_defined_bytes(name: str, head_dim: int, transformed: bool) -> None:
    fmt = kk.format(name)
    transform = transform_of(head_dim) if transformed else None
    kinds = inputs(head_dim)
    caches = [torch.stack(list(inputs(head_dim, seed=s).values())).bfloat16() for s in (0, 1)]
    source = kk.PagedKV.from_caches(*caches, layout="HND")
    target = kk.PagedKV.empty(fmt, len(kinds), HEADS, head_dim, PAGE)
    kv = kk.PagedKV(source.pools + target.pools, source.formats + target.formats, PAGE, transform)
    n = len(kinds)
    kk.pack_pages(kv, 0, 1, torch.stack([torch.arange(n), torch.arange(n).flip(0)], 1).int())
    expected = encode_page(fmt, caches[0].float(), caches[1].float(), transform)
    if not fmt.packed:  # the bits of a NaN that is converted twice are not the definition's
        got, want = (decode_page(fmt, x, PAGE, head_dim) for x in (kv.pools[1].flip(0), expected))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        return
    same_bytes(kv.pools[1].flip(0), expected, list(kinds), fmt, head_dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_write_kv_of_16_bit_numbers(name: str, dtype: torch.dtype) -> None:
    kinds = {kind: x for kind, x in inputs(128).items() if kind != "any bits"}
    k = torch.stack(list(kinds.values())).to(dtype)
    kv = kk.PagedKV.empty(name, len(kinds), HEADS, 128, PAGE)
    rows = k.transpose(1, 2).flatten(0, 1)
    kk.write_kv(rows, rows, kv, 0, torch.arange(len(rows)))
    fmt = kk.format(name)
    same_bytes(kv.pools[0], encode_page(fmt, k, k), list(kinds), fmt, 128)


@pytest.mark.once
@pytest.mark.parametrize("name", ALL + PAIRS)
def test_sizes(name: str) -> None:
    fmt = kk.format(name)
    numbers = [codec(fmt.k).NUMBER, codec(fmt.v).NUMBER]
    for head_dim in fmt.head_dims:
        for page_size in (16, 48, 64, 256) if fmt.packed else (1, 3, 16, 64):
            size = fmt.page_bytes(page_size, head_dim)
            kv = kk.PagedKV.empty(fmt, 3, HEADS, head_dim, page_size)
            assert size == torch.ops.kvkernels.page_bytes(*numbers, page_size, head_dim)
            assert size % 64 == 0
            assert kv.nbytes == 3 * HEADS * size
            assert fmt.bits_per_element(page_size, head_dim) == kv.nbytes * 8 / (3 * HEADS * 2 * page_size * head_dim)
            assert kv.head_dim == head_dim
            page = encode_page(fmt, *torch.zeros(2, page_size, head_dim))
            assert page.shape == (size,)


@pytest.mark.once
def test_bits_per_element_as_published() -> None:
    at_128 = {name: kk.format(name).bits_per_element(64, 128) for name in ALL}
    assert at_128 == {"bf16": 16, "f16": 16, "u8": 8.125, "u4": 4.125, "u3": 3.125, "u2": 2.125, "kivi2": 2.75}
    assert kk.format("kivi2").bits_per_element(256, 128) == 2 + (32 / 256 + 1) / 2


# Relative mean squared error on Gaussian numbers. A uniform grid of 2, 3 and 4 bits with one best scale for all numbers
# leaves 0.1188, 0.0374 and 0.0115; a least-squares scale per 128 numbers does a little better.
DISTORTION = {
    "bf16": (2.5e-6, 3.0e-6),
    "f16": (4.0e-8, 4.6e-8),
    "u8": (3.8e-5, 4.5e-5),
    "u4": (0.0103, 0.0109),
    "u3": (0.0355, 0.0368),
    "u2": (0.1150, 0.1175),
    "kivi2": (0.150, 0.206),
}


@pytest.mark.once
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_error_on_gaussian_numbers(name: str, head_dim: int) -> None:
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(2, 24, 64, head_dim, generator=gen)
    fmt = kk.format(name)
    low, high = DISTORTION[name]
    for original, back in zip(x, decode_page(fmt, encode_page(fmt, x[0], x[1]), 64, head_dim)):
        assert low < ((back - original).square().mean() / original.square().mean()).item() < high


@pytest.mark.once
@pytest.mark.parametrize("name", PACKED)
def test_special_groups(name: str) -> None:
    """Zero and constant groups and those with holes decode to what the format promises; neighbours are unharmed."""
    module = codec(name)
    x = torch.randn(PAGE, 128, generator=torch.Generator().manual_seed(0))
    x[1], x[2] = 0.0, 0.25
    x[3, 5] = float("inf")
    x[4, 5] = float("nan")
    back = module.decode("v", module.encode("v", x, PAGE), PAGE, 128)
    assert (back[1] == 0).all()
    assert ((back[2] - 0.25).abs() <= 0.25 * 2.0**-7).all()
    group = slice(0, 32) if name == "kivi2" else slice(0, 128)
    assert back[3:5, group].isnan().all()
    assert back[[0, *range(5, PAGE)]].isfinite().all()
    huge = module.decode("v", module.encode("v", x.nan_to_num(1.0, 1.0) * 1e37, PAGE), PAGE, 128)
    assert huge.isfinite().all()
    assert (huge[1] == 0).all()


@pytest.mark.once
@pytest.mark.parametrize("name", ["bf16", "f16", "u8", "u4"])
def test_recoding_changes_nothing(name: str) -> None:
    """In the stored basis. u2 and u3 start from the rms, which coding changes, so they may settle on another scale."""
    module = codec(name)
    x = torch.randn(8, PAGE, 128, generator=torch.Generator().manual_seed(1))
    once = module.encode("k", x, PAGE)
    assert torch.equal(module.encode("k", module.decode("k", once, PAGE, 128), PAGE), once)


@pytest.mark.once
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["k", "v"])
def test_token_bytes(name: str, side: str) -> None:
    """The bytes of the tokens part a side among them, and a changed token changes no others."""
    module = codec(name)
    if module.whole_pages(side):
        with pytest.raises(ValueError, match="at once"):
            module.token_bytes(side, 0, PAGE, 64)
        return
    owned = [module.token_bytes(side, t, PAGE, 64) for t in range(PAGE)]
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(module.side_bytes(side, PAGE, 64)))
    x = torch.randn(PAGE, 64, generator=torch.Generator().manual_seed(2))
    y = x.clone()
    y[3] *= 7
    changed = (module.encode(side, x, PAGE) != module.encode(side, y, PAGE)).nonzero().flatten()
    assert set(changed.tolist()) <= set(owned[3].tolist())


@pytest.mark.parametrize("n", [1, 2, 64, 128, 256, 12, 24, 48, 20, 40, 160, 28, 56, 1024])
def test_hadamard_matrix_is_the_kernels(n: int) -> None:
    h = hadamard_matrix(n)
    assert torch.equal(h, h.T)
    assert set(h.flatten().tolist()) <= {1.0, -1.0}
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    if n <= 256:
        assert torch.equal(h @ h, n * torch.eye(n, dtype=torch.float64))
        # whole numbers: exact in any order
        assert torch.equal(torch.ops.kvkernels.fwht(torch.eye(n), 1.0), h.float())
    torch.testing.assert_close(fwht(x), x @ h)
    torch.testing.assert_close(torch.ops.kvkernels.fwht(x, 1.0), x @ h)
    if n & (n - 1) == 0:
        single = x.float()
        assert torch.equal(torch.ops.kvkernels.fwht(single, fwht_scale(n)), fwht(single, fwht_scale(n)))


@pytest.mark.once
def test_the_folder_is_the_list_of_formats_def() -> None:
    text = (Path(__file__).parent.parent / "include/kvkernels/formats.def").read_text()
    listed = re.findall(r"^KK_FORMAT\((\w+), (\d+)\)", text, re.M)
    assert [(name, str(module.NUMBER)) for name, module in CODECS.items()] == listed


@pytest.mark.once
def test_format() -> None:
    pair = kk.format("u3", "u2")
    assert pair == kk.format("u3/u2") == kk.format(pair) == kk.Format("u3", "u2")
    assert (pair.name, kk.format("u2").name) == ("u3/u2", "u2")
    assert pair.code == CODECS["u3"].NUMBER | CODECS["u2"].NUMBER << 8
    assert pair.packed
    assert not kk.format("bf16", "f16").packed
    assert (pair.rotated_k, kk.format("kivi2", "u2").rotated_k, kk.format("kivi2", "u2").rotated_v) == (
        True,
        False,
        True,
    )
    assert kk.format("kivi2", "u2").whole_pages
    assert not kk.format("u2", "kivi2").whole_pages


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kk.format("int9"), 'unknown format "int9"; known formats: bf16, f16, u8, u4, u3, u2, kivi2'),
        (lambda: kk.format("u2", "int9"), 'unknown format "int9"'),
        (lambda: kk.format("u2").page_bytes(24, 128), "page_size must be a multiple of 16 for a packed format; got 24"),
        (lambda: kk.format("bf16").page_bytes(0, 128), "page_size must be at least 1; got 0"),
        (lambda: kk.format("u2").page_bytes(64, 96), "head_dim must be one of 64, 128, 256 for .* got 96"),
        (lambda: kk.format("f16").page_bytes(64, 100), "must be one of 64, 80, 96, 112, 128, 192, 256 .* got 100"),
        (lambda: kk.PagedKV.empty("u2", 4, 2, 96, 64), "head_dim must be one of 64, 128, 256"),
        (lambda: kk.PagedKV.empty("u2", 4, 0, 64, 64), "num_kv_heads must be at least 1; got 0"),
        (lambda: kk.PagedKV.empty(["u2", "bf16"], [4], 2, 64, 64), "one per format; got 1 for 2 formats"),
        (lambda: kk.PagedKV.empty(["u2"] * 9, 4, 2, 64, 64), "1 to 8 pools .* got 9"),
        (lambda: kk.PagedKV.empty("u2", -1, 2, 64, 64), "num_pages must be 0 to .* got -1"),
        (lambda: kk.PagedKV.empty("u2", 4, 2, 64, 64).entry(1, 0), "pool must be 0 to 0; got 1"),
        (lambda: kk.PagedKV.empty("u2", 4, 2, 64, 64).entry(0, 4), "page must be below 4, the pages of pool 0; got 4"),
        (lambda: kk.PagedKV((torch.zeros(1, 2, 9).byte(),), (kk.format("u2"),), 64).head_dim, "9 bytes fit no"),
        (lambda: caches(layout="DNH"), "layout must be .* got 'DNH'"),
        (lambda: caches(v=torch.zeros(3, 16, 2, 128).half()), "v_cache must have the shape of k_cache, "),
        (lambda: caches(v=torch.zeros(3, 2, 64).half()), "v_cache must be .* 4 dims"),
        (lambda: caches(k=torch.zeros(3, 16, 64, 2).half().transpose(2, 3)), "contiguous in its last dim"),
        (lambda: caches(*torch.zeros(2, 3, 16, 2, 72).half()), "head_dim must be one of .* got 72"),
    ],
)  # fmt: skip
def test_errors_say_what_was_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.once
def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="named by a str; got int"):
        kk.format(2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="k_cache must be bfloat16 or float16"):
        caches(k=torch.zeros(3, 16, 2, 64))


def caches(k: Tensor | None = None, v: Tensor | None = None, layout: str = "NHD") -> kk.PagedKV:
    plain = torch.zeros(3, 16, 2, 64, dtype=torch.float16)
    return kk.PagedKV.from_caches(plain if k is None else k, plain if v is None else v, layout)


@pytest.mark.once
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_from_caches_is_a_view(layout: str) -> None:
    k, v = torch.zeros(3, 16, 2, 80, dtype=torch.bfloat16), torch.zeros(3, 16, 2, 80, dtype=torch.float16)
    if layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    kv = kk.PagedKV.from_caches(k, v, layout)
    assert kv.formats == (kk.format("bf16", "f16"),)
    assert (kv.page_size, kv.num_kv_heads, kv.head_dim) == (16, 2, 80)
    assert kv.code(0) == kv.formats[0].code | 1 << 16
    assert [t.data_ptr() for t in kv.pools[0]] == [k.data_ptr(), v.data_ptr()]
    assert [t.shape for t in kv.pools[0]] == [(3, 2, 16, 80)] * 2
    assert kv.entry(0, 2) == 2


@pytest.mark.once
def test_entries_tell_pools_apart() -> None:
    kv = kk.PagedKV.empty(["bf16", "u2", kk.format("u4", "u2")], [1, 2, 3], 2, 64, 64)
    assert [p.shape[0] for p in kv.pools] == [1, 2, 3]
    assert kv.entry(2, 1) == 2 << 28 | 1
    assert kv.nbytes == sum(n * 2 * f.page_bytes(64, 64) for n, f in zip((1, 2, 3), kv.formats))
