"""torch.compile of a decode step: one graph, and no new one from token to token."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from hybridize.static_cache import HybridStaticCache
from tests.remote.hybrids import model_of
from tests.static import GROUPS, MIXED, hybrid, read
from tests.tolerances import assert_close

# The first call sees numbers, the second that one of them grows. A static cache has no number that grows.
GROWING, FIXED = 2, 1
# Mixers with more graphs than that over a cache that grows, and why.
MORE = {"block_sparse": "which slot a token gets is a walk back over whole windows, and each depth of it is a graph"}
# Filled by the prompt, as windows are from then on.
PROMPT, STEPS = 8, 9


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, cache, ids, backend, mask=None, **options):
    """Logits of a prompt and of compiled steps behind it; `fullgraph` makes every break an error."""

    def decode(model, cache, ids, mask, positions):
        return model(ids, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=positions).logits

    step = torch.compile(decode, backend=backend, fullgraph=True, **options)
    out = [read(model, cache, ids[:, :PROMPT], (PROMPT,), mask)]
    with torch.no_grad():
        for at in range(PROMPT, PROMPT + STEPS):
            seen = positions = None
            if mask is not None:
                seen = mask[:, : at + 1]
                positions = seen.sum(1, keepdim=True) - 1
            out.append(step(model, cache, ids[:, at : at + 1], seen, positions))
    return torch.cat(out, dim=1)


def whole(model, ids):
    with torch.no_grad():
        return model(ids[:, : PROMPT + STEPS], use_cache=False).logits


@pytest.mark.slow
def test_a_mixed_hybrid_over_a_static_cache_is_one_graph(ids):
    model, counter = model_of("llama", MIXED), CompileCounter()
    out = compiled(model, HybridStaticCache(model.config, 30), ids, counter)
    assert counter.frame_count == FIXED
    assert_close(out, whole(model, ids), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple(n for n in names if n not in MORE) for names in GROUPS], ids="-".join)
def test_every_mixer_over_a_cache_that_grows(names, ids):
    model, counter = hybrid(*names), CompileCounter()
    out = compiled(model, DynamicCache(config=model.config), ids, counter)
    assert counter.frame_count <= GROWING
    assert_close(out, whole(model, ids), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_those_with_more_graphs_have_no_break(name, ids):
    model, counter = hybrid(name), CompileCounter()
    out = compiled(model, DynamicCache(config=model.config), ids, counter)
    assert counter.frame_count > GROWING
    assert_close(out, whole(model, ids), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_every_mixer_over_a_static_cache(names, ids):
    model, counter = hybrid(*names), CompileCounter()
    out = compiled(model, HybridStaticCache(model.config, 30), ids, counter, dynamic=False)
    assert counter.frame_count == FIXED
    assert_close(out, whole(model, ids), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DynamicCache, HybridStaticCache])
def test_with_padding_and_what_comes_behind_dynamo(kind, ids):
    """Left padding, and the graph made functional for a compiler: writes in place must come out of it."""
    model, counter = hybrid("streaming", "mamba2"), CompileCounterWithBackend("aot_eager")
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = kind(config=model.config) if kind is DynamicCache else kind(model.config, 30)
    out = compiled(model, cache, ids, counter, mask)
    expected = read(model, DynamicCache(config=model.config), ids, (PROMPT, *[1] * STEPS), mask)
    assert counter.frame_count <= GROWING
    assert_close(out[mask[:, : PROMPT + STEPS].bool()], expected[mask[:, : PROMPT + STEPS].bool()], "fp32")


@pytest.mark.slow
def test_generate_with_a_static_cache_compiles_once(ids):
    """What transformers does by itself on a GPU: masks made beside the compiled step, which is one graph."""
    model = model_of("llama", MIXED)
    mask = torch.ones_like(ids[:, :10])
    mask[1, :3] = 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids[:, :10], **common)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    counters.clear()
    out = model.generate(ids[:, :10], cache_implementation="static", compile_config=compile_config, **common)
    assert torch.equal(out, expected)
    assert counters["stats"]["unique_graphs"] == FIXED
    assert not counters["graph_break"]
