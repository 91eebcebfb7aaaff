"""What a recipe's `plan` section means, what it must not say, and that the plan's figures are the built object's."""

import re

import pytest
import torch
from transformers.utils import logging

from hybridize.checkpoint import open_base
from hybridize.conversions import plan
from hybridize.conversions.plan import kept_layers, layer_specs
from hybridize.core import Plan, plan_table, ranges
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.modeling import build_model, hybrid_config, state_bytes
from tests.tiny import tiny_base

torch.set_num_threads(1)
logging.disable_progress_bar()

MAMBA = {"name": "mamba2", "method": "mimetic"}
WINDOW = {"name": "streaming", "sink_tokens": 0, "window_tokens": 16}


GMU = {"name": "gmu"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: open_base(tiny_base(family, folder)) for family in FAMILIES}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ({"every": 4}, {3, 7}),
        ({"every": 1}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ({"every": 11}, set()),
        ({"layers": [9, 0]}, {0, 9}),
        ({"layers": []}, set()),
        ({"first": 2, "last": 1}, {0, 1, 9}),
        ({"last": 3}, {7, 8, 9}),
        ({"first": 4, "last": 6}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ({"middle": 0.3}, {3, 4, 5}),
        ({"middle": 0.36}, {3, 4, 5, 6}),
        ({"middle": 0.01}, {4}),
        ({"middle": 1}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}),
    ],
)
def test_keep(keep, kept):
    assert kept_layers(keep, 10) == kept


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"keep": {"layers": [10]}, "mixer": WINDOW}, "layer 10 is out of range: the base has 10 layers, 0 to 9"),
        ({"keep": {"layers": [-1]}, "mixer": WINDOW}, "layer -1 is out of range"),
        ({"keep": {"layers": [True]}, "mixer": WINDOW}, "layer True is out of range"),
        ({"keep": {"layers": 3}, "mixer": WINDOW}, "expected a list of layer numbers"),
        ({"keep": {"every": 0}, "mixer": WINDOW}, "plan.keep.every is 0, expected an integer >= 1"),
        ({"keep": {"first": 6, "last": 5}, "mixer": WINDOW}, "first + last is 11, out of range"),
        ({"keep": {"every": 2, "first": 1}, "mixer": WINDOW}, "got every, first together"),
        ({"keep": {"middle": 0}, "mixer": WINDOW}, "plan.keep.middle is 0, expected a share"),
        ({"keep": {"middle": 3}, "mixer": WINDOW}, "plan.keep.middle is 3, expected a share"),
        ({"keep": {"middle": 0.3, "first": 1}, "mixer": WINDOW}, "got middle, first together"),
        ({"keep": {"evry": 2}, "mixer": WINDOW}, "unknown key 'evry'. Did you mean 'every'?"),
        ({"keep": {"count": 7, "by": "lazy"}, "mixer": WINDOW}, "needs layer scores"),
        ({"keep": "some", "mixer": WINDOW}, "expected `all` or a mapping"),
        ({"keep": {"every": 2}}, "plan.mixer is missing"),
        ({"mixer": WINDOW}, "plan.keep is missing"),
        ({"keep": "all", "mixer": WINDOW, "layers": {}}, "layers together with keep or mixer"),
        ({"parts": [{"cycle": [WINDOW]}], "keep": "all"}, "got parts together with keep, expected one or the other"),
        ({"parts": {"cycle": [WINDOW]}}, "expected a list of 1 to 10 mappings with cycle and last"),
        ({"parts": []}, "expected a list of 1 to 10 mappings"),
        ({"parts": [{"cycle": [WINDOW]}] * 11}, "expected a list of 1 to 10 mappings"),
        ({"parts": [{"cycle": []}]}, "plan.parts.0: got {'cycle': []}, expected a mapping with cycle, a list of mixers"),
        ({"parts": [{"cycle": [WINDOW]}, {"last": WINDOW}]}, "plan.parts.1: got {'last'"),
        ({"parts": [{"cycle": [WINDOW], "lats": WINDOW}]}, "plan.parts.0: unknown key 'lats'. Did you mean 'last'?"),
        ({"budget": {"state_ratio": 0.5}}, "plan.budget needs layer scores"),
        ({"kep": "all"}, "plan: unknown key 'kep'. Did you mean 'keep'?"),
        ({"layers": {3: WINDOW}}, "layer 0 is not named and there is no default"),
        ({"layers": {10: WINDOW, "default": WINDOW}}, "layer 10 is out of range"),
        ({"layers": {"ten": WINDOW, "default": WINDOW}}, "layer 'ten' is out of range"),
        (
            {"keep": "all", "mixer": {"name": "streaming", "window": 3}},
            "has no option 'window'. Did you mean 'window_tokens'",
        ),
        ({"keep": "all", "mixer": {"name": "gnd"}}, "unknown mixer 'gnd'"),
        ([], "expected a mapping"),
    ],
)
def test_sections_that_are_refused(section, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        layer_specs(section, 10)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "streaming", "window_tokens": "wide"}, "window_tokens is 'wide', expected int"),
        ({"name": "streaming", "window_tokens": 0}, "expected >= 0 and >= 1"),
        ({"name": "mamba2", "method": "magic"}, "method is 'magic', expected one of 'calibrated', 'mimetic'"),
        ({"name": "mamba2", "taps": 4}, "has no option 'taps'. Known: conv_tokens, heads, method, norm_eps, proj_bias"),
        ({"name": "attention", "x": 1}, "mixer 'attention' has no option 'x'. It has none"),
        (["mamba2"], "expected a mapping with a name"),
    ],
)
def test_mixers_that_are_refused(bases, spec, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        plan(bases["llama"], {"layers": {"default": spec}}, "test", 0)


@pytest.mark.parametrize(
    ("count", "letters"),
    [(2, "ag"), (3, "mag"), (4, "maga"), (5, "mwaga"), (8, "mwmagaga"), (9, "mwmwagaga")],
)
def test_parts_are_cycles_over_equal_shares_of_the_depth(count, letters):
    lower = {"cycle": [MAMBA, WINDOW], "last": {"name": "attention"}}
    upper = {"cycle": [GMU, {"name": "attention"}]}
    names = {"m": "mamba2", "w": "streaming", "a": "attention", "g": "gmu"}
    specs = layer_specs({"parts": [lower, upper]}, count)
    assert [spec["name"] for spec in specs] == [names[letter] for letter in letters]
    assert layer_specs({"parts": [{"cycle": [spec]} for spec in specs]}, count) == specs


def test_a_reader_that_names_no_layer_reads_the_nearest_below(bases):
    def reads(**layers):
        section = {"layers": {**{key[1:]: spec for key, spec in layers.items()}, "default": {"name": "attention"}}}
        return plan(bases["llama"], section, "test", 0).layers[2].mixer

    assert reads(_0=MAMBA, _1=MAMBA, _2=GMU) == {"name": "gmu", "reads": 1}
    assert reads(_0=MAMBA, _2=GMU) == {"name": "gmu", "reads": 0}
    assert reads(_0=MAMBA, _1=MAMBA, _2={**GMU, "reads": 0}) == {"name": "gmu", "reads": 0}


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({2: GMU}, "plan: layer 2: mixer 'gmu' reads the memory of a layer below it, and none of these has one"),
        ({0: GMU, 1: MAMBA}, "plan: layer 0: mixer 'gmu' reads the memory of a layer below it, and none"),
        ({0: {**GMU, "reads": 1}, 1: MAMBA}, "plan: layer 0: mixer 'gmu' reads layer 1, expected a layer below it"),
        ({0: MAMBA, 2: {**GMU, "reads": 1}}, "plan: layer 2: mixer 'gmu' reads layer 1, which is 'attention' and has no memory"),
        ({0: MAMBA, 2: {**GMU, "reads": 3}}, "plan: layer 2: mixer 'gmu' reads layer 3, which is out of range: the base has 3"),
        ({0: MAMBA, 2: {**GMU, "method": "open"}}, "method is 'open', expected one of 'calibrated', 'zero'"),
    ],
)
def test_readers_that_are_refused(bases, layers, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        plan(bases["llama"], {"layers": {**layers, "default": {"name": "attention"}}}, "test", 0)
    assert "\n" not in str(caught.value)


def test_a_plan_forms_groups_of_adjacent_layers_from_the_bottom_up(tmp_path):
    """(reads, group_layers) of each xkv layer: groups that are full, cut short by another mixer, by the top, or by options."""
    base = open_base(tiny_base("llama", tmp_path, num_hidden_layers=9))
    xkv, other = {"name": "xkv"}, {"name": "xkv", "rank": 5}

    def groups(layers, default="xkv"):
        mixers = [layer.mixer for layer in plan(base, {"layers": {**layers, "default": default}}, "test", 0).layers]
        return [(spec["reads"], spec["group_layers"]) if spec["name"] == "xkv" else spec["name"] for spec in mixers]

    four = [(None, 4), *[(0, 4)] * 3]
    assert groups({}) == [*four, (None, 4), *[(4, 4)] * 3, (None, 1)]
    assert groups({}, {"name": "xkv", "group_layers": 9}) == [(None, 9), *[(0, 9)] * 8]
    assert groups({}, {"name": "xkv", "group_layers": 1}) == [(None, 1)] * 9
    assert groups({2: "attention"})[:4] == [(None, 2), (0, 2), "attention", (None, 4)]
    assert groups({1: other, 2: other})[:4] == [(None, 1), (None, 2), (1, 2), (None, 4)]
    # Other conversions make other groups too; what is named stays.
    assert groups({0: {**xkv, "method": "xkv"}})[:3] == [(None, 1), (None, 4), (1, 4)]
    named = {0: {**xkv, "reads": None, "group_layers": 3}, 1: "attention", 4: {**xkv, "reads": 0, "group_layers": 3}}
    assert groups(named, "attention") == [(None, 3), "attention", "attention", "attention", (0, 3), *["attention"] * 4]
    # A named owner that another mixer follows is joined by nobody.
    assert groups({0: {**xkv, "reads": None}, 1: "attention"})[2:4] == [(None, 4), (2, 4)]
    assert groups({0: {**xkv, "reads": None}})[1:5] == [(0, 4), (0, 4), (0, 4), (None, 4)]


def test_layers_by_number_or_by_text(bases):
    section = {"layers": {0: WINDOW, "2": MAMBA, "default": {"name": "attention"}}}
    names = [layer.mixer["name"] for layer in plan(bases["llama"], section, "test", 0).layers]
    assert names == ["streaming", "attention", "mamba2"]


def test_options_go_to_mixer_or_conversion_with_defaults(bases):
    section = {"keep": {"layers": []}, "mixer": {**MAMBA, "conv_tokens": 3}}
    layer = plan(bases["llama"], section, "test", 0).layers[0]
    assert layer.mixer == {"name": "mamba2", "conv_tokens": 3, "heads": "grouped", "proj_bias": True, "norm_eps": None}
    assert layer.conversion == {"name": "mamba2", "method": "mimetic"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", [WINDOW, MAMBA, {"name": "attention"}])
def test_figures_are_the_built_models(bases, family, mixer):
    made = plan(bases[family], {"keep": {"layers": [1]}, "mixer": mixer}, "test", 0)
    config = hybrid_config(bases[family].config, [layer.mixer for layer in made.layers])
    layers = build_model(config).model.layers
    for planned, built in zip(made.layers, layers, strict=True):
        assert planned.parameters == sum(p.numel() for p in built.self_attn.parameters())
    for tokens in ("1024", "131072"):
        assert sum(layer.state_bytes[tokens] for layer in made.layers) == state_bytes(config, int(tokens))


def test_a_bare_name_is_a_mixer_with_its_defaults(bases):
    base = bases["llama"]
    for short, full in [
        ({"layers": {0: "mla", "default": "attention"}}, {"layers": {0: {"name": "mla"}, "default": {"name": "attention"}}}),
        ({"keep": {"layers": [1]}, "mixer": "gdn"}, {"keep": {"layers": [1]}, "mixer": {"name": "gdn"}}),
        ({"parts": [{"cycle": ["gla", "mla"]}]}, {"parts": [{"cycle": [{"name": "gla"}, {"name": "mla"}]}]}),
    ]:
        assert plan(base, short, "t", 0) == plan(base, full, "t", 0)
    with pytest.raises(ConfigError, match="Did you mean 'gdn'"):
        plan(base, {"layers": {"default": "gdnn"}}, "t", 0)


def test_kv_share_counts_what_grows(bases):
    base = bases["llama"]

    def share(mixer, keep=(1,)):
        return plan(base, {"keep": {"layers": list(keep)}, "mixer": mixer}, "t", 0).kv_share

    assert share({"name": "mamba2"}) == share({"name": "streaming", "window_tokens": 70}) == pytest.approx(1 / 3)
    assert share({"name": "mamba2"}, ()) == 0
    assert plan(base, {"keep": "all"}, "t", 0).kv_share == 1


def test_json_and_back(bases):
    made = plan(bases["qwen3"], {"keep": {"every": 2}, "mixer": MAMBA}, "test", 3)
    back = Plan.from_dict(made.to_dict())
    assert back == made
    assert back.digest() == made.digest()
    assert plan(bases["qwen3"], {"keep": {"every": 2}, "mixer": MAMBA}, "test", 4).digest() != made.digest()


def test_table_merges_equal_layers(bases):
    made = plan(bases["llama"], {"keep": {"layers": [1]}, "mixer": WINDOW}, "test", 0)
    rows = plan_table(made)
    assert [(row["layers"], row["mixer"]) for row in rows] == [("0, 2", "streaming"), ("1", "attention")]
    assert rows[0]["parameters"] == made.layers[0].parameters + made.layers[2].parameters
    assert rows[0]["state_bytes"]["8192"] == 2 * made.layers[0].state_bytes["8192"]
    assert rows[0]["options"] == {"sink_tokens": 0, "window_tokens": 16}


def test_ranges():
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert ranges([]) == ""


OTHER_EPS = {**MAMBA, "norm_eps": 1e-3}


@pytest.mark.parametrize(
    ("family", "section", "target", "reason"),
    [
        ("llama", {"keep": "all"}, "llama", "every layer is kept"),
        ("qwen3", {"keep": "all"}, "qwen3", "own class"),
        ("llama", {"keep": {"every": 3}, "mixer": MAMBA}, "granitemoehybrid", ""),
        ("mistral", {"keep": {"every": 3}, "mixer": MAMBA}, "granitemoehybrid", ""),
        ("qwen2", {"keep": {"every": 3}, "mixer": MAMBA}, "granitemoehybrid", ""),
        ("qwen3", {"keep": {"every": 3}, "mixer": MAMBA}, "none", "q/k-norms"),
        ("llama", {"keep": {"every": 3}, "mixer": OTHER_EPS}, "none", "norm_eps is 0.001"),
        ("llama", {"keep": {"layers": []}, "mixer": MAMBA}, "none", "at least one attention layer"),
        ("llama", {"keep": {"every": 3}, "mixer": WINDOW}, "ministral", ""),
        ("qwen2", {"keep": {"every": 3}, "mixer": WINDOW}, "qwen2", ""),
        ("qwen3", {"keep": {"every": 3}, "mixer": WINDOW}, "qwen3", ""),
        ("llama", {"keep": {"every": 3}, "mixer": {"name": "streaming"}}, "none", "keeps the first tokens"),
        ("qwen2", {"keep": {"every": 3}, "mixer": {"name": "block_sparse"}}, "none", "keeps strided blocks"),
        ("qwen3", {"keep": {"every": 3}, "mixer": {"name": "streaming_heads"}}, "none", "heads of one layer different windows"),
        (
            "llama",
            {"layers": {0: WINDOW, "default": MAMBA}},
            "none",
            "no class of transformers mixes mamba2, streaming",
        ),
        ("llama", {"layers": {0: WINDOW, "default": {**WINDOW, "window_tokens": 8}}}, "none", "one window"),
        ("llama", {"keep": {"every": 3}, "mixer": {"name": "gla"}}, "none", "gated linear attention"),
        ("llama", {"keep": {"every": 3}, "mixer": {"name": "lolcats"}}, "none", "one normaliser"),
        ("llama", {"layers": {0: MAMBA, 1: {"name": "attention"}, 2: GMU}}, "none", "gated memory units"),
    ],
)
def test_native_verdict(bases, family, section, target, reason):
    verdict = plan(bases[family], section, "test", 0).native
    assert verdict["target"] == target
    assert reason in verdict["reason"]


def test_native_needs_whole_multiples(tmp_path):
    base = open_base(tiny_base("llama", tmp_path, head_dim=12))
    verdict = plan(base, {"keep": {"every": 3}, "mixer": MAMBA}, "test", 0).native
    assert verdict["reason"].startswith("heads x head_dim = 48 is no multiple of hidden_size = 32")
