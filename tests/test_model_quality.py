"""The caches that bench/accuracy.py compares: different ways to the same attention agree."""

import pytest
import torch
from torch import Tensor

from bench.caches import Cache, Pages, PagesRead, Recoded, Rows
from bench.model_quality import recipes
from bench.recipes import SIMULATED, defined

SINKS, RECENT, PAGE, HEADS, DIM = 4, 32, 16, 2, 64
PROMPT, BLOCKS = SINKS + 96, (32, 32, 7, 1)
EPS = 2.0**-8  # half a unit of bf16


def numbers(tokens: int, heads: int, seed: int) -> Tensor:
    return torch.randn(tokens, heads, DIM, generator=torch.Generator().manual_seed(seed)).bfloat16()


def outputs(cache: Cache) -> Tensor:
    return torch.cat([cache.attend(*(numbers(n, h, s) for s, h in enumerate((6, 2, 2)))) for n in BLOCKS]).float()


def prompt() -> tuple[Tensor, Tensor]:
    return numbers(PROMPT, HEADS, 10), numbers(PROMPT, HEADS, 11)


def pages(kind: type[Pages], fmt: str) -> Pages:
    return kind(*prompt(), fmt, PAGE, SINKS, RECENT, PROMPT + sum(BLOCKS))


def close(a: Tensor, b: Tensor, units: int) -> None:
    assert (a - b).abs().max() <= units * EPS * b.abs().max()


@pytest.mark.once
def test_bf16_pages_are_16_bit_rows() -> None:
    rows = Rows()
    rows.q, (rows.k, rows.v) = numbers(PROMPT, 6, 12), prompt()
    close(outputs(pages(Pages, "bf16")), outputs(rows), 2)


@pytest.mark.once
@pytest.mark.parametrize("fmt", ["u2", "kivi2", "m31/t1.e5m3"])
def test_two_ways_to_read_pages(fmt: str) -> None:
    packed, read = outputs(pages(Pages, fmt)), outputs(pages(PagesRead, fmt))
    close(packed, read, 4)  # read_kv's rows are rounded to bf16
    assert (packed - outputs(pages(Pages, "bf16"))).abs().max() > 0.05  # and what was packed did leave the window


@pytest.mark.once
def test_keys_before_rope_are_rotated_where_they_stand() -> None:
    def rope(x: Tensor, start: int, inverse: bool) -> Tensor:
        angle = (
            (-1 if inverse else 1) * torch.arange(start, start + len(x))[:, None, None] / torch.arange(1, DIM // 2 + 1)
        )
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def both(fmt: str) -> tuple[Tensor, Tensor]:
        sizes = fmt, PAGE, SINKS, RECENT, PROMPT + sum(BLOCKS)
        return outputs(PagesRead(*prompt(), *sizes)), outputs(PagesRead(*prompt(), *sizes, rope=rope))

    close(*both("bf16"), 4)  # keys are rounded to bf16 before RoPE, not after it
    after, before = both("u2")
    assert (after - before).abs().max() > 0.02  # other numbers were packed


@pytest.mark.once
def test_recoding_by_definition_is_the_format() -> None:
    keys, values = (defined(side, "u2").make(HEADS, PAGE, lambda x, start, inverse: x) for side in "kv")
    recoded = Recoded(*prompt(), lambda k, v, at: (keys(k, at), values(v, at)), PAGE, SINKS, RECENT, PROMPT + 72)
    close(outputs(recoded), outputs(pages(Pages, "u2")), 4)


@pytest.mark.once
def test_recipes_have_titles_of_their_own() -> None:
    titles = [recipe.title for recipe in recipes()]
    assert len(titles) == len(set(titles))


@pytest.mark.once
@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_sides_are_near_what_they_code(name: str) -> None:
    x = numbers(128, HEADS, 0).float()
    for side in SIMULATED[name]:
        assert 1.0 < side.bits(DIM, PAGE) < 5.0
        coded = side.make(HEADS, PAGE, lambda x, start, inverse: x)(x, 0)
        assert coded.shape == x.shape
        assert 0.0 < (coded - x).square().mean() < 0.6 * x.square().mean()
