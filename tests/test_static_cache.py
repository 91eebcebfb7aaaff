"""Static caches: the logits of one that grows; steps that are the same operations on the same memory at any length."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, DynamicCache, StaticCache

from hybridize.cache import cache_bytes
from hybridize.errors import ConfigError
from hybridize.graphs import GraphedDecoder
from hybridize.mixers import MIXERS
from hybridize.mixers.ring import Ring
from hybridize.mixers.windowed import Reach
from hybridize.modeling import build_model, hybrid_config
from hybridize.static_cache import HybridStaticCache
from tests.mixers.test_contract import SMALL
from tests.remote.hybrids import model_of
from tests.static import GROUPS, MIXED, devices, hybrid, read, recorded, wide
from tests.tiny import SIZES
from tests.tolerances import TOLERANCES, assert_close, rms_ratio

# A prompt, a second piece of it, and steps far past every window of five tokens.
PIECES = (9, 6, *[1] * 40)
TOKENS = sum(PIECES)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def mask(ids):
    """The second row has four tokens of padding on its left."""
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return mask


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_logits_are_those_of_a_cache_that_grows(names, ids, mask):
    model = wide(hybrid(*names))
    grown = read(model, DynamicCache(config=model.config), ids, PIECES, mask)
    cache = HybridStaticCache(model.config, TOKENS)
    fixed = read(model, cache, ids, PIECES, mask)
    real = mask.bool()
    assert_close(fixed[real], grown[real], "fp64")
    # The same without any cache, which neither of the two has had a part in.
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    assert_close(fixed[real], whole[real], "fp32")
    assert int(cache.get_seq_length()) == TOKENS


@pytest.mark.parametrize(
    ("name", "wrong"), [("streaming", "slot"), ("block_sparse", "slot"), ("block_sparse", "count"), ("block_sparse", "lasting")]
)
def test_a_wrong_ring_would_show(name, wrong, ids, monkeypatch):
    shown, write = Ring.read, Ring.write
    if wrong == "slot":
        monkeypatch.setattr(Ring, "write", lambda self, pairs, before, real: write(self, pairs, before + 1, real))
    elif wrong == "count":
        monkeypatch.setattr(Ring, "read", lambda self, count: shown(self, count + 1))
    else:
        monkeypatch.setattr(Ring, "read", Ring.places)
    # Blocks that last are held twice while they are in the window.
    model, pieces = wide(hybrid(name)), (3, 2, 1, 1)
    grown = read(model, DynamicCache(config=model.config), ids, pieces)
    fixed = read(model, HybridStaticCache(model.config, TOKENS), ids, pieces)
    assert rms_ratio(fixed, grown) > 1e3 * TOLERANCES["fp64"][0]


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize(("block", "stride"), [(1, 0), (2, 3), (3, 2), (1, 1)])
def test_a_ring_holds_what_the_reach_can_read(sink, block, stride):
    """Token by token: what is in the slots, against the rule itself."""
    reach = Reach(sink=sink, window=4, block=block, stride=stride)
    ring = Ring(reach, 30)
    held = torch.full((1, 1, ring.slots, 1), -1.0)
    for place in range(30):
        ring.write([(held, torch.full((1, 1, 1, 1), float(place)))], torch.tensor([place]), None)
        shown = ring.read(torch.tensor([place + 1]))[0]
        expected = [p for p in range(place + 1) if place - p < 4 or bool(reach.lasts(torch.tensor(p)))]
        assert sorted(shown[shown >= 0].tolist()) == expected
        assert held[0, 0, shown >= 0, 0].tolist() == shown[shown >= 0].tolist()


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_a_step_can_be_captured(names, ids):
    """From an empty window to a full one: the same operations, nothing that asks the device, no tensor that moves."""
    model = hybrid(*names)
    cache = HybridStaticCache(model.config, 24)
    read(model, cache, ids[:, :3], (3,))
    decoder = GraphedDecoder(model, cache)
    memory = [tensor.data_ptr() for tensor in (*cache.tensors(), decoder.ids, decoder.positions)]
    before = [tensor.clone() for tensor in cache.tensors()]
    first, stops = recorded(decoder.run)
    assert stops == []
    for _ in range(8):
        decoder.run()
    again, _ = recorded(decoder.run)
    assert again == first
    assert memory == [tensor.data_ptr() for tensor in (*cache.tensors(), decoder.ids, decoder.positions)]
    assert all(torch.any(tensor != was) for tensor, was in zip(cache.tensors(), before, strict=True) if _changes(tensor))


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_a_step_asks_the_host_for_nothing(names, ids, monkeypatch):
    """On a device without numbers, where reading one is an error and a tensor of another device shows."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    model, ids = hybrid(*names).to("meta"), ids.to("meta")
    cache = HybridStaticCache(model.config, 24)
    read(model, cache, ids[:, :3], (3,))
    operations, stops = recorded(GraphedDecoder(model, cache).run)
    assert stops == []
    assert {device for _, given, made in operations for device in devices(given) | devices(made)} == {"meta"}
    assert recorded(lambda: torch.ones(2).to("meta"))[1] == ["_to_copy.default"]
    with pytest.raises(RuntimeError, match="meta"):
        int(ids[0, 0])


def _changes(tensor):
    """All but the counts of padding, and tensors of no size."""
    return tensor.numel() and not (tensor.dtype == torch.long and tensor.dim() == 1)


def test_a_step_with_padding_can_be_captured(ids, mask):
    model = model_of("llama", MIXED)
    cache = HybridStaticCache(model.config, 24)
    read(model, cache, ids[:, :9], (9,), mask)
    decoder = GraphedDecoder(model, cache, mask[:, :9])
    first, stops = recorded(decoder.run)
    assert stops == []
    assert recorded(decoder.run)[0] == first


def test_what_grows_cannot_be_captured(ids):
    """The same questions, asked of the entry that grows: other operations, and tensors elsewhere."""
    model = hybrid("streaming")
    cache = DynamicCache(config=model.config)
    read(model, cache, ids[:, :3], (3,))
    moves, sequences = set(), []
    for at in range(3, 9):
        sequences.append(recorded(lambda at=at: read(model, cache, ids[:, at : at + 1], (1,)))[0])
        moves.add(cache.layers[0].keys.data_ptr())
    assert any(other != sequences[0] for other in sequences[1:])
    assert len(moves) > 1
    # And of a step that asks the device.
    assert recorded(lambda: int(torch.ones(2).sum()))[1] == ["_local_scalar_dense.default"]


def test_the_decoders_steps_are_the_models(ids, mask):
    """What is captured, run as it is: ids in, logits out, positions counted on the device."""
    model = model_of("llama", MIXED)
    expected = read(model, DynamicCache(config=model.config), ids[:, :30], (9, *[1] * 21), mask[:, :30])
    cache = HybridStaticCache(model.config, 30)
    read(model, cache, ids[:, :9], (9,), mask)
    decoder = GraphedDecoder(model, cache, mask[:, :9])
    for at in range(9, 30):
        decoder.ids.copy_(ids[:, at : at + 1])
        assert_close(decoder.run(), expected[:, at], "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS.names())
def test_a_graph_gives_the_models_logits(name, ids, mask):
    model = hybrid(name).cuda()
    ids, mask = ids.cuda(), mask.cuda()
    expected = read(model, DynamicCache(config=model.config), ids, (9, *[1] * (TOKENS - 9)), mask)
    cache = HybridStaticCache(model.config, TOKENS)
    read(model, cache, ids[:, :9], (9,), mask)
    decoder = GraphedDecoder(model, cache, mask[:, :9])
    for at in range(9, TOKENS):
        assert_close(decoder.step(ids[:, at : at + 1]), expected[:, at], "fp32")
    with pytest.raises(ConfigError, match=f"room for {TOKENS} tokens and holds {TOKENS}"):
        decoder.step(ids[:, :1])


@pytest.mark.parametrize("first", ["attention", "streaming"])
def test_kept_attention_with_a_sliding_window(first, ids, mask):
    """The mask has the window; it is sized by whichever layer the library asks first."""
    windowed = AutoConfig.for_model("mistral", **SIZES, sliding_window=4)
    specs = [{"name": "attention"}, {"name": "streaming", **SMALL["streaming"]}, {"name": "attention"}]
    model = wide(build_model(hybrid_config(windowed, specs if first == "attention" else specs[1:] + specs[:1])).eval())
    real, positions = mask[:, :21].bool(), (mask.cumsum(1) - 1).clamp(min=0)[:, :21]
    with torch.no_grad():
        whole = model(ids[:, :21], attention_mask=mask[:, :21], position_ids=positions, use_cache=False).logits
    cache = HybridStaticCache(model.config, 30)
    assert_close(read(model, cache, ids, (9, *[1] * 12), mask)[real], whole[real], "fp64")
    decoder = GraphedDecoder(model, cache, mask[:, :21])
    first, stops = recorded(decoder.run)
    assert stops == []
    assert recorded(decoder.run)[0] == first


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("qwen3", 1)])
def test_generate_static(family, beams, ids, mask):
    model = model_of(family, MIXED)
    common = {"attention_mask": mask[:, :12], "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    common |= {"pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids[:, :12], **common)
    assert torch.equal(model.generate(ids[:, :12], cache_implementation="static", **common), expected)
    with pytest.raises(ConfigError, match="'offloaded_static', expected 'static'"):
        model.generate(ids[:, :12], cache_implementation="offloaded_static", **common)


def test_emptied_it_is_as_new(ids):
    model = model_of("llama", [*MIXED, {"name": "parallel", "window_tokens": 5}, {"name": "low_rank_kv"}, {"name": "lolcats"}])
    cache = HybridStaticCache(model.config, 20)
    first = read(model, cache, ids[:, :20], (9, *[1] * 11))
    size = cache_bytes(cache)
    cache.reset()
    read(model, cache, ids[:, 20:35], (9, *[1] * 6))
    cache.reset()
    assert torch.equal(read(model, cache, ids[:, :20], (9, *[1] * 11)), first)
    assert cache_bytes(cache) == size


def test_what_does_not_fit_is_refused(ids):
    model = model_of("llama", MIXED)
    cache = HybridStaticCache(model.config, 8)
    with pytest.raises(ConfigError, match="is empty"):
        GraphedDecoder(model, cache)
    read(model, cache, ids[:, :8], (7, 1))
    with pytest.raises(ConfigError, match="room for 8 tokens and holds 8, got 1 more"):
        read(model, cache, ids[:, :1], (1,))
    with pytest.raises(ConfigError, match="holds 2 rows, got 1"):
        read(model, cache, ids[:1, :1], (1,))
    with pytest.raises(ConfigError, match="of 2 rows cannot become one of 4"):
        cache.layers[1].batch_repeat_interleave(2)
    with pytest.raises(ConfigError, match="got a StaticCache"):
        read(model, StaticCache(model.config, 8), ids[:, :8], (8,))
    with pytest.raises(ConfigError, match="expected at least 1"):
        HybridStaticCache(model.config, 0)
    decoder = GraphedDecoder(model, cache)
    with pytest.raises(ConfigError, match="one token of each row"):
        decoder.step(ids[:, :2])
    with pytest.raises(ConfigError, match="on cpu, expected a CUDA device"):
        decoder.step(ids[:, :1])
    with pytest.raises(ConfigError, match="expected that of the prompt"):
        GraphedDecoder(model, cache, torch.ones(2, 3))
    with pytest.raises(ConfigError, match="expected a HybridStaticCache"):
        GraphedDecoder(model, DynamicCache())
    with pytest.raises(ConfigError, match="in training"):
        GraphedDecoder(model.train(), cache)
