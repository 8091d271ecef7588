"""transformers with a KVCache: as with its own caches in 16 bits, as with the decoded pages in fewer."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import kvkernels as kk
from kvkernels.integrations.transformers import KVCache, attach, attention

pytestmark = [
    pytest.mark.once,
    backends.on_cpu_only,
    pytest.mark.filterwarnings("error:KVCache"),  # that attention does not read pages
]

SMALL = {"page_size": 16, "sink_tokens": 16, "recent_tokens": 32}
F16: dict[str, Any] = {"format": "f16", "dtype": torch.float16, **SMALL}

COMMON = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 128, "num_key_value_heads": 1, "num_attention_heads": 3, "hidden_size": 96}),
    "mistral": ("Mistral", {"sliding_window": 72}),
    # softcapped scores; every second layer slides
    "gemma2": ("Gemma2", {"head_dim": 256, "sliding_window": 72, "attn_logit_softcapping": 2.0, "hidden_size": 64}),
    # attention sinks; every second layer slides
    "gpt_oss": ("GptOss", {"sliding_window": 72, "num_local_experts": 2, "num_experts_per_tok": 1}),
}

# Linear attention in three layers of four, whose states only have to be kept.
HYBRID = {
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1,
    "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    family, own = MODELS.get(name, ("Qwen3Next", HYBRID))
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **own, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def text(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, tokens: int) -> Tensor:
    """A mask with 11 columns of padding before the second sequence, 22 before the third."""
    return (torch.arange(tokens) >= 11 * torch.arange(batch)[:, None]).long()


def generate(model: Any, ids: Tensor, cache: Any, new: int = 40, **options: Any) -> tuple[Tensor, Tensor]:
    """Sequences, and logits [B, new, V]."""
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def forced(model: Any, cache: Any, ids: Tensor, prompt: int, mask: Tensor | None = None, step: int = 1) -> Tensor:
    """Logits of the tokens after the prompt, fed in steps: [B, T - prompt, V]."""
    logits = []
    with torch.no_grad():
        for first, last in [
            (0, prompt),
            *((i, min(i + step, ids.shape[1])) for i in range(prompt, ids.shape[1], step)),
        ]:
            options = {}
            if mask is not None:
                positions = (mask[:, :last].cumsum(1) - 1).clamp(min=0)[:, first:]
                options = {"attention_mask": mask[:, :last], "position_ids": positions}
            logits.append(model(ids[:, first:last], past_key_values=cache, **options).logits)
    return torch.cat(logits[1:], 1)


def wide_first_layer(index: int) -> str:
    return "u4" if index == 0 else "u2"


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", [*MODELS, "qwen3_next"])
def test_16_bits_are_as_the_cache_of_transformers(name: str) -> None:
    """Batch with padding; prompt past all windows. The rounding to 16 bits is known from a model that was not attached,
    which decodes the pages."""
    model, ids, mask = make(name), text(3, 70), padding(3, 70)
    expected, exact = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens, logits = generate(model, ids, KVCache(**F16, config=model.config), attention_mask=mask)
    assert torch.equal(tokens, expected)
    rounding = error(logits, exact)
    assert 0 < rounding < 2e-3 * float(exact.abs().max())
    attach(model)
    tokens, logits = generate(model, ids, KVCache(**F16, config=model.config), attention_mask=mask)
    assert torch.equal(tokens, expected)
    assert error(logits, exact) <= 2 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    """Then nothing is rounded on the way into the cache."""
    model, ids = make("llama").to(dtype), text(2, 70)
    truth = forced(copy.deepcopy(model).float(), DynamicCache(), ids, 40)
    own = forced(model, DynamicCache(), ids, 40)
    cache = KVCache("bf16" if dtype == torch.bfloat16 else "f16", **SMALL)
    logits = forced(attach(model), cache, ids, 40)
    assert cache.bits_per_element == 16 * 80 / 70  # 5 pages of 16 for 70 tokens
    assert error(logits.float(), truth) <= 2 * error(own.float(), truth)


@pytest.mark.parametrize(
    ("name", "step", "format"),
    [(name, step, "u2") for name in MODELS for step in (1, 5, 30)] + [("llama", 1, "m31/t1"), ("qwen3", 5, "kivi2")],
)
def test_few_bits_are_as_the_decoded_pages(name: str, step: int, format: str) -> None:
    """Steps of 1 and 5 tokens are read from the pages; 30 go through SDPA on what the cache held, decoded."""
    model, ids = make(name), text(2, 180)
    original = model.config._attn_implementation
    exact = forced(model, DynamicCache(config=model.config), ids, 120, step=step)
    cache = KVCache(format, **SMALL)
    logits = forced(attach(model), cache, ids, 120, step=step)
    assert cache.bits_per_element < 10
    model.set_attn_implementation(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = forced(model, KVCache(format, **SMALL, transforms=cache.transforms), ids, 120, step=step)
    # Only the newest keys and values are not rounded in `decoded`; later, pages are packed whose codes that changed.
    early = max(step, 5)
    assert error(logits[:, :early], decoded[:, :early]) < 0.02 * error(decoded[:, :early], exact[:, :early])
    assert float((logits - decoded).abs().mean()) < 0.5 * float((decoded - exact).abs().mean())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padding_changes_nothing(name: str) -> None:
    model, ids, mask = attach(make(name)), text(3, 130), padding(3, 130)
    logits = forced(model, KVCache("u2", **SMALL, calibrate=False), ids, 100, mask)
    for row in range(3):
        alone = forced(model, KVCache("u2", **SMALL, calibrate=False), ids[row : row + 1, 11 * row :], 100 - 11 * row)
        assert error(alone[0], logits[row]) < 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beam_search(name: str) -> None:
    model, ids, mask = make(name), text(2, 70), padding(2, 70)
    options = {"num_beams": 3, "attention_mask": mask, "new": 25}
    expected, _ = generate(model, ids, DynamicCache(config=model.config), **options)
    greedy, _ = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask, new=25)
    assert not torch.equal(expected, greedy)
    cache = KVCache(**F16)
    tokens, _ = generate(attach(model), ids, cache, **options)
    assert torch.equal(tokens, expected)
    # Beams of a sequence share what they have in common: less than two of them alone would take.
    alone = KVCache(**F16)
    generate(model, ids, alone, attention_mask=mask, new=25)
    assert cache.nbytes < 2 * alone.nbytes


def test_rows_repeated_and_selected() -> None:
    model, ids = attach(make("llama")), text(2, 80)
    cache, other = KVCache("u2", **SMALL, calibrate=False), KVCache("u2", **SMALL, calibrate=False)
    forced(model, cache, ids, 70)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.batch_size == 2
    forced(model, other, ids.flip(0), 70)
    new = text(2, 10, seed=2)
    assert torch.equal(forced(model, cache, new, 3), forced(model, other, new, 3))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_several_turns(name: str) -> None:
    """The second turn's text is longer than a step that reads pages; a copied cache goes on by itself."""
    model, ids, more = make(name), text(2, 70), text(2, 25, seed=2)
    results = []
    for cache in (DynamicCache(config=model.config), KVCache(**F16)):
        if isinstance(cache, KVCache):
            attach(model)
        first, _ = generate(model, ids, cache, new=20)
        saved = copy.deepcopy(cache)
        second, _ = generate(model, torch.cat([first, more], 1), cache, new=20)
        other, _ = generate(model, torch.cat([first, more + 0 * more], 1), saved, new=20)
        assert torch.equal(second, other)
        results.append(second)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("format", ["m31/u2.e5m3", ["u4", "u2", "u2", "u2"], wide_first_layer])
def test_a_pickled_cache_goes_on(name: str, format: Any) -> None:
    """As the one that was pickled does, which it shares nothing with; saved between a prompt and its continuations."""
    model, ids, mask = attach(make(name)), text(2, 150), padding(2, 150)
    cache = KVCache(format, **SMALL, config=model.config)
    forced(model, cache, ids[:, :120], 100, mask[:, :120])
    saved = pickle.dumps(cache)
    loaded, other = pickle.loads(saved), pickle.loads(saved)
    assert len({int(x.number) for x in (cache, loaded, other)}) == 3
    assert repr(loaded) == repr(cache)
    assert loaded.nbytes == cache.nbytes
    assert len(loaded.transforms) == len(cache.transforms)
    assert all(torch.equal(*pair) for a, b in zip(loaded.transforms, cache.transforms) if a and b for pair in zip(a, b))

    def go_on(cache: KVCache, ids: Tensor) -> Tensor:
        logits = []
        for first, last in ((120, 140), (140, 141)):
            positions = (mask[:, :last].cumsum(1) - 1)[:, first:]
            options = {"attention_mask": mask[:, :last], "position_ids": positions}
            logits.append(model(ids[:, first:last], past_key_values=cache, **options).logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        go_on(other, ids.flip(0))
        assert torch.equal(go_on(loaded, ids), go_on(cache, ids))


def test_padding_between_turns() -> None:
    model, ids = make("llama"), text(2, 120)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[0, :9] = mask[1, 60:83] = 0
    exact = forced(model, DynamicCache(), ids, 60, mask, 30)
    cache = KVCache(**F16)
    logits = forced(attach(model), cache, ids, 60, mask, 30)
    assert cache.pages.groups.popitem()[1].paging.lens == [111, 97]
    real = mask[:, 60:].bool()
    assert error(logits[real], exact[real]) < 1e-2


def test_assisted_generation_takes_tokens_back() -> None:
    model = attach(make("llama"))
    ids = text(1, 12).repeat(1, 8)  # repeats, so that some of what is looked up is right
    expected, _ = generate(model, ids, KVCache(**F16))
    taken_back = []

    class Counting(KVCache):
        def crop(self, tokens_to_remove: int) -> None:
            taken_back.append(-tokens_to_remove)
            super().crop(tokens_to_remove)

    tokens, _ = generate(model, ids, Counting(**F16), prompt_lookup_num_tokens=4)
    assert torch.equal(tokens, expected)
    assert max(taken_back) > 0


@pytest.mark.parametrize("columns", [3, 20, 70])
def test_crop(columns: int) -> None:
    """70 tokens reach into pages that were packed, of which one becomes a page of 16 bits again."""
    model, ids, more = make("llama"), text(2, 150), text(2, 20, seed=2)
    left = 150 - columns
    theirs = DynamicCache()
    forced(model, theirs, ids, 120)
    theirs.crop(-columns)
    exact = forced(model, theirs, more, 1)
    attach(model)
    ours, packed = KVCache(**F16), KVCache("u2", **SMALL)
    for cache in (ours, packed):
        forced(model, cache, ids, 120)
        cache.crop(-columns)
        assert cache.get_seq_length() == left
    assert error(forced(model, ours, more, 1), exact) < 1e-2
    other = copy.deepcopy(packed)
    logits = forced(model, packed, more, 1)
    model.set_attn_implementation("sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = forced(model, other, more, 1)
    early = slice(0, 5)  # before pages are packed again
    assert error(logits[:, early], decoded[:, early]) < 0.02 * error(decoded[:, early], exact[:, early])


def test_reset_keeps_what_was_calibrated() -> None:
    model, ids = attach(make("llama")), text(2, 150)
    cache = KVCache("u2", **SMALL)
    assert cache.transforms == []
    first = forced(model, cache, ids, 120)
    centre = cache.transforms[1].centre
    assert float(centre.abs().max()) > 0
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(forced(model, cache, ids, 120), first)
    assert cache.transforms[1].centre is centre
    given = KVCache("u2", **SMALL, transforms=cache.transforms)
    assert torch.equal(forced(model, given, ids, 120), first)
    assert not torch.equal(forced(model, KVCache("u2", **SMALL, calibrate=False), ids, 120), first)


def test_calibration_is_of_the_first_text_without_its_sinks() -> None:
    """Of a prompt all of it; of a text that comes token by token what is there when the first page is packed."""
    model, ids, mask = attach(make("llama")), text(2, 150), padding(2, 150)
    plain = KVCache(**F16)
    forced(model, plain, ids, 149, mask)
    layer = plain.pages.layers[0]
    keys, _ = layer.pages.read(layer.group.paging.slots(150), torch.float32)
    for prompt, tokens in ((149, (149, 138)), (20, (64, 53))):
        cache = KVCache("u2", **SMALL)
        forced(model, cache, ids, prompt, mask)
        centre, balance = cache.transforms[0][:2]
        seen = torch.cat([keys[row, 16:n] for row, n in enumerate(tokens)])
        torch.testing.assert_close(centre, seen.mean(0), rtol=0, atol=2e-3)
        assert float((balance - 1).abs().max()) > 0.1


@pytest.mark.traced
def test_compiled_whole() -> None:
    """Sizes that change are symbols from the third graph on."""
    model, ids, mask = attach(make("mistral")), text(2, 130), padding(2, 130)
    options = {**SMALL, "calibrate": False}
    expected = forced(model, KVCache("u2", **options), ids, 120, mask)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    prompt, compiled = model.forward, torch.compile(model.forward, backend=backend, fullgraph=True)
    cache = KVCache("u2", **options)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    with torch.no_grad():
        for first, last in [(0, 120), *((i, i + 1) for i in range(120, 130))]:
            logits.append(
                (compiled if first else prompt)(
                    ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                    past_key_values=cache,
                ).logits
            )  # fmt: skip
    assert torch.equal(torch.cat(logits[1:], 1), expected)
    assert len(graphs) <= 3


def test_compiled_with_attention_that_was_not_switched() -> None:
    model, cache = make("llama"), KVCache(**F16)
    with pytest.raises(RuntimeError, match="Dynamo failed to run FX node with fake tensors"), torch.no_grad():
        torch.compile(model.forward, backend="eager", fullgraph=True)(text(1, 5), past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_an_attached_model_with_other_caches(name: str) -> None:
    model, ids, mask = make(name), text(2, 70), padding(2, 70)
    expected, exact = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    tokens, logits = generate(attach(model), ids, DynamicCache(config=model.config), attention_mask=mask)
    assert torch.equal(tokens, expected)
    assert error(logits, exact) < 1e-4
    tokens, _ = generate(model, ids, None, attention_mask=mask, use_cache=False)
    assert torch.equal(tokens, expected)


def test_formats_by_layer_and_bytes() -> None:
    """All that is in use: as much as a kvkernels.KVCache of each layer."""
    model, ids = attach(make("llama", num_hidden_layers=3)), text(2, 200)
    for given in (["u4", "u2/u3", "bf16"], lambda i: ["u4", "u2/u3", "bf16"][i]):
        cache = KVCache(given, **SMALL, dtype=torch.bfloat16)
        forced(model, cache, ids, 190)
        expected = 0
        for format in ("u4", "u2/u3", "bf16"):
            layer = kk.KVCache(2, 2, 64, format, **SMALL)
            layer.append(*torch.zeros(2, 2, 200, 2, 64))
            expected += layer.nbytes
        assert cache.nbytes == expected <= cache.reserved_nbytes
        assert cache.bits_per_element == expected * 8 / (3 * 2 * 2 * 200 * 2 * 64)


def test_sliding_windows_give_pages_up() -> None:
    model, ids = attach(make("mistral")), text(1, 300)
    cache = KVCache("u2", **SMALL)
    sizes = []
    with torch.no_grad():
        for first in range(0, 300, 20):
            model(ids[:, first : first + 20], past_key_values=cache)
            sizes.append(cache.nbytes)
    assert max(sizes[8:]) < 1.3 * sizes[8]
    forced(model, whole := KVCache("u2", **SMALL), ids, 299)
    assert whole.nbytes <= max(sizes)
    cache.crop(-SMALL["recent_tokens"])
    with pytest.raises(ValueError, match=r"has 268 tokens, of which only the last 72 .* 32 \(recent_tokens\)"):
        cache.crop(-SMALL["recent_tokens"])


def test_a_model_that_is_not_attached_says_so() -> None:
    model = make("llama")
    with pytest.warns(UserWarning, match=r"decodes the whole cache. Call .*attach\(model\)"):
        generate(model, text(1, 5), KVCache(**F16), new=3)


def test_errors() -> None:
    model, ids = attach(make("llama")), text(2, 30)
    with pytest.raises(ValueError, match=r"keys require grad, but a cache has no backward; use torch.no_grad\(\)"):
        model(ids, past_key_values=KVCache())
    with pytest.raises(TypeError, match="dtype must be bfloat16, float16 or None; got"):
        KVCache(dtype=torch.float32)
    with pytest.raises(ValueError, match="recent_tokens must be at least 0; got -1"):
        KVCache(recent_tokens=-1)
    with pytest.raises(ValueError, match='unknown format "u9"'):
        KVCache(["u2", "u9"])
    with torch.no_grad():
        with pytest.raises(ValueError, match="format has 1 entries, but the model a layer 1"):
            model(ids, past_key_values=KVCache(["u2"]))
        with pytest.raises(ValueError, match="head_dim must be one of 64, 128, 256 for a packed format; got 96"):
            attach(make("llama", head_dim=96))(ids, past_key_values=KVCache())
        with pytest.raises(ValueError, match=r"has linear attention; pass config=model.config"):
            attach(make("qwen3_next"))(ids, past_key_values=KVCache())
        cache = KVCache(**F16)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 2 sequences, got 1; reset\(\) empties it"):
            model(ids[:1], past_key_values=cache)
        hidden = torch.ones(2, 31, dtype=torch.long)
        hidden[1, 4] = 0
        with pytest.raises(ValueError, match="attention_mask hides stored tokens"):
            model(ids[:, :1], attention_mask=hidden, past_key_values=cache)
        with pytest.raises(ValueError, match="takes minus the number of tokens to remove; got 3"):
            cache.crop(3)


@torch.no_grad()
def test_padding_inside_a_sliding_window_is_refused() -> None:
    """transformers counts it in the window, pages do not hold it; long steps go by the mask."""
    model, ids = attach(make("mistral", sliding_window=20)), text(2, 58)
    mask = torch.ones_like(ids)
    mask[0, 32:40] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for columns in (1, 17):
        cache, theirs = KVCache(**F16), DynamicCache()
        outs = []
        for held in (cache, theirs):
            model(ids[:, :40], attention_mask=mask[:, :40], position_ids=position[:, :40], past_key_values=held)
            step = slice(40, 40 + columns)
            new = {"attention_mask": mask[:, : 40 + columns], "position_ids": position[:, step]}
            if columns == 1 and held is cache:
                with pytest.raises(ValueError, match="padding must not stand inside the sliding window of 20"):
                    model(ids[:, step], **new, past_key_values=held)
            else:
                outs.append(model(ids[:, step], **new, past_key_values=held).logits)
        if len(outs) == 2:
            assert error(outs[0], outs[1]) < 2e-3


@torch.no_grad()
def test_another_batch_after_all_was_taken_back() -> None:
    model, cache = attach(make("llama")), KVCache(**F16)
    model(text(2, 20), past_key_values=cache)
    cache.crop(-20)
    ids = text(3, 40)
    assert torch.equal(forced(model, cache, ids, 30), forced(model, KVCache(**F16), ids, 30))


@torch.no_grad()
def test_too_few_keys_to_calibrate() -> None:
    """Says so, and the next text calibrates."""
    model, cache = attach(make("llama")), KVCache("m31/u2", **SMALL)
    with pytest.warns(UserWarning, match="too few to calibrate"):
        model(text(1, 70), past_key_values=cache)
    assert cache.transforms == [None, None]
    cache.reset()
    model(text(1, 300), past_key_values=cache)
    assert all(t is not None for t in cache.transforms)


def test_a_broken_forward_pass() -> None:
    model, ids, cache = attach(make("llama")), text(2, 30), KVCache(**F16)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        q, k = torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 1, 64)
        attention(model.model.layers[0].self_attn, q, *cache.update(k, k, 0), None)
        with pytest.raises(ValueError, match=r"layers \[1\] lack tokens: a forward pass was broken off; call reset"):
            cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match=r"layer 1 has 30 tokens and gets 2 for 2 sequences, .* call reset\(\)"):
            model(ids[:, :2], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("where", ["kv_cache.zero_pool", "kv_cache.write_kv", "paging.Paging._append"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_step_that_fails_at_its_first_layer_changes_nothing(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, tokens, a second text with padding: each is tried without memory, and then done."""
    model, ids = attach(make(name)), text(2, 160)
    mask = torch.ones(2, 160, dtype=torch.long)
    mask[1, 100:109] = 0

    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    def run(cache: KVCache, first: int, last: int) -> Tensor:
        options = {"attention_mask": mask[:, :last]} if last > 100 else {}
        return model(ids[:, first:last], past_key_values=cache, **options).logits

    cache, undisturbed, failures = KVCache("u2", **SMALL), KVCache("u2", **SMALL), []
    steps = [(0, 81), *((i, i + 1) for i in range(81, 100)), (100, 160)]
    for first, last in steps:
        with monkeypatch.context() as patch:
            patch.setattr(f"kvkernels.{where}", fail)
            try:
                run(copied := copy.deepcopy(cache), first, last)
            except MemoryError:
                failures.append(first)
                cache = copied
        assert torch.equal(run(cache, first, last), run(undisturbed, first, last))
    assert {0, 100} <= set(failures)
    assert cache.nbytes == undisturbed.nbytes


LATENT = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "kv_lora_rank": 64, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip


@torch.no_grad()
def test_latent_attention_is_refused() -> None:
    """By attach, and at the first layer of a prompt for a model that was made with our attention, or with its own."""
    config = transformers.DeepseekV3Config(**{**COMMON, **LATENT, "head_dim": None})
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"attach: DeepseekV3ForCausalLM has multi-head latent attention .*rank = 64"):
        attach(model)
    for name in ("kvkernels", "sdpa"):
        model.set_attn_implementation(name)
        with pytest.raises(
            ValueError, match=r"layer 0 caches keys of \[1, 1, 5, 64\] and values of \[1, 1, 5, 32\].*MLA"
        ):
            model(text(1, 5), past_key_values=KVCache())


@torch.no_grad()
def test_chunked_attention_is_refused() -> None:
    """Every fourth layer of Llama 4 sees all tokens, the others chunks. Without our attention the cache serves."""
    config = transformers.Llama4TextConfig(
        **{**COMMON, "num_hidden_layers": 4}, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=64
    )
    torch.manual_seed(0)
    model, ids = transformers.Llama4ForCausalLM(config).eval(), text(1, 45)
    exact = forced(model, DynamicCache(config=config), ids, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(forced(model, KVCache(**F16), ids, 40), exact) < 2e-3 * float(exact.abs().max())
    with pytest.raises(ValueError, match=r"attach: Llama4ForCausalLM: layer 0 has chunked attention .*size = 16"):
        attach(model)
    model.set_attn_implementation("kvkernels")
    with pytest.raises(ValueError, match="KVCache: layer 0 has chunked attention"):
        model(ids, past_key_values=(cache := KVCache(**F16)))
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_two_models_in_one_cache() -> None:
    model, ids, cache = attach(make("llama")), text(2, 30), KVCache(**F16)
    model(ids, past_key_values=cache)
    for name, changes, message in (
        (
            "qwen3",
            {},
            "layer 0 holds keys of 2 heads of 64 channels on cpu; got 1 of 128 on cpu. A cache is for one model",
        ),
        ("llama", {"num_hidden_layers": 3}, r"layer 2 has 0 tokens and gets 5 .* batch or model; call reset\(\)"),
    ):
        with pytest.raises(ValueError, match=f"KVCache: {message}"):
            attach(make(name, **changes))(ids[:, :5], past_key_values=copy.deepcopy(cache))
    cache.reset()
    attach(make("qwen3"))(ids, past_key_values=cache)


@torch.no_grad()
def test_a_transform_that_does_not_fit() -> None:
    model, ids = attach(make("llama")), text(1, 20)
    good = kk.KVTransform(torch.zeros(2, 64), torch.ones(2, 64))
    for given, error, message in (
        (good._replace(centre=torch.zeros(2, 128)), ValueError, r"layer 1: transform.centre must be .*, 128\]"),
        (good._replace(balance=good.balance.double()), TypeError, "layer 1: transform.balance must be torch.float32"),
    ):
        with pytest.raises(error, match=f"KVCache: {message}"):
            model(ids, past_key_values=KVCache("u2", transforms=[good, given]))
    with pytest.raises(TypeError, match=r"KVCache: transforms\[1\] must be a KVTransform or None; got tuple"):
        KVCache("u2", transforms=[None, tuple(good)])
