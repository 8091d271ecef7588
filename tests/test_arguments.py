"""What every op does with the arguments it is given, over all ops: tensors it writes, values of a wrong type."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

import numpy
import pytest
import torch
from backends import Q_DTYPE, on_cpu_only
from conftest import tensors_of, to_device
from torch import Tensor

import kvkernels as kk
from kvkernels.ops import OPS, _scores, delta_rule_step, merge_states

# Where a wrapper finds its op; the rest are made of those.
FOUND: dict[str, tuple[Any, str]] = {name: (op, "_op") for name, op in OPS.items() if hasattr(op, "_op")}
FOUND["score_tokens"] = (_scores, "_score_tokens")
FOUND |= {name: (OPS[name], "_plain_op") for name in FOUND if hasattr(OPS[name], "_plain_op")}  # first_case is plain


def first_case(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return to_device(OPS[name].make(OPS[name].cases()[0]))


@pytest.mark.once
@pytest.mark.traced
@pytest.mark.parametrize("name", FOUND)
def test_a_write_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the version of each tensor of the caller that the schema calls written, under no_grad too, and of no other."""
    args, options = first_case(name)
    with torch.no_grad():
        result = getattr(kk, name)(*args, **options)
    if "out" in getattr(kk, name).__annotations__:
        options["out"] = result[0] if options.get("return_lse") else result
    own = {id(t) for t in tensors_of((args, options))}
    flat: list[tuple[bool, Tensor, int]] = []
    real = getattr(*FOUND[name])

    def record(*given: Any) -> Any:
        for argument, value in zip(real._schema.arguments, given):
            written = argument.alias_info is not None and argument.alias_info.is_write
            tensors = tensors_of(tuple(value) if isinstance(value, list) else value)
            flat.extend((written, t, t._version) for t in tensors if id(t) in own)
        return real(*given)

    monkeypatch.setattr(*FOUND[name], record)
    with torch.no_grad():
        getattr(kk, name)(*args, **options)
    assert flat
    for written, t, version in flat:
        assert t._version == version + written


@on_cpu_only
def test_a_changed_tensor_has_no_gradient() -> None:
    """A backward pass that saved a state refuses to run once a later step has changed it."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, 1, 8, generator=gen) for _ in range(3))
    pool = torch.randn(2, 1, 8, 8, generator=gen)
    slots = torch.arange(2, dtype=torch.int32)

    def step() -> None:
        kk.delta_rule_step(q[:, 0], k[:, 0], v[:, 0], None, state=pool, slots=slots)

    k.requires_grad_()
    o = kk.delta_rule(q, k, v, None, initial_state=pool)
    with torch.no_grad():
        step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    with torch.inference_mode():
        pool = pool.clone()
    with torch.no_grad():
        step()  # a tensor of inference mode counts nothing


Q = torch.zeros(1)
# Of an annotation, as it is or with None: values of a wrong type.
WRONG: dict[Any, tuple[Any, ...]] = {
    Tensor: ([[0]], "a", 1.0),
    int: ("a", 1.5, [1]),
    float: ("a", [1.0]),
    str: (3,),
    torch.dtype: ("float32",),
    tuple[int, int]: (5, (5.0, 0), (5,), None),
    Sequence[int]: (5, torch.zeros(2), (0.5,)),
    tuple[Tensor, Tensor, Tensor]: (5, "a", (Q, None, Q)),
    tuple[Tensor, Tensor]: (5, (Q,), (Q, None)),
    delta_rule_step.Gate: ((None, None, 0.0), (Q, 1.0, 0.0), (Q, None, "a")),
    merge_states.States: (5, None, [1.0, 2.0]),
    kk.PagedKV: (None, (Q,), Q),
    kk.PageSummaries: ((Q,), Q),
    kk.PageSummaries | kk.PagedKV: (None, Q),
    kk.Offloaded: (None, Q),
    kk.Plan: (5, (Q, None, Q)),
}


def wrong_arguments() -> Iterator[tuple[str, str, Any]]:
    for name in OPS:
        for argument, hint in get_type_hints(getattr(kk, name)).items():
            if argument == "return" or hint is bool:
                continue
            some = [kind for kind in WRONG if hint in (kind, kind | None)]
            assert some, f"{name}: {argument}: {hint}"
            yield from ((name, argument, value) for value in WRONG[some[0]])
            if hint is Tensor:
                yield name, argument, None


@pytest.mark.once
@pytest.mark.parametrize(("name", "argument", "value"), [*wrong_arguments()])
def test_a_wrong_type_is_named(name: str, argument: str, value: Any) -> None:
    function = getattr(kk, name)
    args, options = OPS[name].make(OPS[name].cases()[0])
    call = inspect.signature(function).bind(*args, **options).arguments
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: {argument}\S* must be .+got "):
        function(**{**call, argument: value})


def attention(**change: Any) -> None:
    """quant_attention of 2 sequences, 4 query heads, 2 KV heads, D 64, with one argument changed."""
    kv = kk.PagedKV.empty("u2", 3, 2, 64, 16)
    table, lens = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    good = {"q": torch.zeros(2, 4, 64, dtype=Q_DTYPE), "kv": kv, "page_table": table, "seq_lens": lens}
    if "in_kv" in change:
        change = {"kv": kv._replace(**change["in_kv"])}
    kk.quant_attention(**{**good, **change})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.tensor(1.0)}, "q must have more dims, got []"),
        ({"q": torch.zeros(2, 4, 0)}, "q must not be empty in its last dim, got [2, 4, 0]"),
        ({"page_table": [[0]]}, "page_table must be a tensor, got [[0]]"),
        ({"softcap": None}, "softcap must be a number, got None"),
        ({"window": 5}, "window must be 2 ints, got 5"),
        ({"window": (5.0, 0)}, "window[0] must be an int, got 5.0"),
        ({"head_map": torch.zeros(4)}, "head_map must be a sequence of ints or None, got Tensor"),
        ({"extra": 5}, "extra must be 3 tensors or None, got 5"),
        ({"in_kv": {"formats": ("u2",)}}, "kv.formats[0] must be a Format, got 'u2'"),
        ({"in_kv": {"transform": (Q, Q)}}, "kv.transform must be a KVTransform or None, got (Tensor, Tensor)"),
        ({"in_kv": {"page_size": 16.0}}, "kv.page_size must be an int, got 16.0"),
        ({"in_kv": {"pools": (None,)}}, "kv.pools[0] must be a tensor or 2 tensors, got None"),
    ],
)
def test_wrong_types_in_words(change: dict[str, Any], message: str) -> None:
    attention()
    with pytest.raises((TypeError, ValueError), match=re.escape(f"quant_attention: {message}") + "$"):
        attention(**change)


def test_refusals_are_in_the_name_of_the_function_that_was_called() -> None:
    (q, kv, table, lens), _ = OPS["quant_attention"].make(OPS["quant_attention"].cases()[0])
    with pytest.raises(ValueError, match=r"^prefix_attention: page_table is too narrow"):
        kk.prefix_attention(q, kv, table[:, :0], lens)
    with pytest.raises(ValueError, match=r"^prefix_attention: sinks must be float32"):
        kk.prefix_attention(q, kv, table, lens, sinks=torch.zeros(q.shape[1]).half())
    k = torch.zeros(1, 4, 2, 32)
    with pytest.raises(ValueError, match=r"^delta_context: v must be float32 like k"):
        kk.delta_context(k, k.half(), None)
    with pytest.raises(TypeError, match=r"^delta_context: g must be a tensor or None, got 0\.5"):
        kk.delta_context(k, k, None, 0.5)  # type: ignore[arg-type]


def test_memory_that_is_not_there_is_torch_s_own_error() -> None:
    scores, lens = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="allocate"):
        kk.select_pages(scores, lens, 1 << 60, page_size=16)


def test_counts_are_integers_of_any_kind() -> None:
    sizes = numpy.array([3, 2, 64, 16])
    kv = kk.PagedKV.empty(["u2", "bf16"], *sizes)
    assert [tuple(p.shape[:2]) for p in kv.pools] == [(3, 2), (3, 2)]
    assert (kv.page_size, kv.head_dim) == (16, 64)
    for place, name in enumerate(("num_pages", "num_kv_heads", "head_dim", "page_size")):
        wrong: list[Any] = [*sizes]
        wrong[place] = 1.5
        with pytest.raises(TypeError, match=rf"{name} must be an int; got 1\.5"):
            kk.PagedKV.empty("u2", *wrong)
    with pytest.raises(TypeError, match="v_cache must be a tensor; got NoneType"):
        kk.PagedKV.from_caches(torch.zeros(2, 16, 1, 64).half(), None)  # type: ignore[arg-type]


def test_entries_of_tensors() -> None:
    kv = kk.PagedKV.empty(["u2", "bf16"], [3, 0], 2, 64, 16)
    pages = torch.arange(3).flip(0)
    entries = kv._replace(pools=kv.pools[::-1], formats=kv.formats[::-1]).entry(1, pages)
    assert entries.dtype == torch.int32
    assert entries.tolist() == [1 << 28 | 2, 1 << 28 | 1, 1 << 28]
    assert kv.entry(1, pages[:0]).shape == (0,)
    for wrong, got in ((pages + 1, "3"), (pages - 1, "-1")):
        with pytest.raises(ValueError, match=f"page must be below 3, the pages of pool 0; got {got}"):
            kv.entry(0, wrong)
    for page, kind in ((pages.float(), "a tensor of ints; got torch.float32"), (0.5, "an int; got 0.5")):
        with pytest.raises(TypeError, match=f"page must be .*{kind}"):
            kv.entry(0, page)  # type: ignore[call-overload]


def test_reprs_are_short() -> None:
    """Sizes, no tensors; whatever is wrong with a cache does not keep it from being printed."""
    kv = kk.PagedKV.empty(["u2", "bf16"], [3, 4], 2, 128, 32)
    caches = kk.PagedKV.from_caches(*torch.zeros(2, 5, 16, 2, 80).half())
    lens = torch.zeros(1, dtype=torch.int32)
    assert repr(kv) == "PagedKV(u2: 3 pages; bf16: 4 pages; 2 heads of 128, 32 tokens a page, 0.14 MB)"
    assert repr(caches) == "PagedKV(f16 (two caches): 5 pages; 2 heads of 80, 16 tokens a page, 0.05 MB)"
    summaries = kk.page_summaries(kv, lens[:, None], lens)
    assert repr(summaries).startswith("PageSummaries(minmax, 16 bits; records of 3 + 4 pages, head_dim 128, 32 tokens")
    assert repr(kv._replace(formats=(5, None))).startswith("PagedKV((tensor(")
