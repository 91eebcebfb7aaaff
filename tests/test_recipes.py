import pytest
from transformers import AutoConfig

from hybridize.checkpoint import describe_base, open_base
from hybridize.conversions import plan
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.pipeline import check_components
from hybridize.recipe import MAX_BYTES, builtin_recipes, load_recipe
from tests.tiny import tiny_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(family, root) for family in FAMILIES}


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_are_valid_and_plan_on_every_family(name, bases):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    check_components(recipe)
    for path in bases.values():
        assert len(plan(open_base(path), recipe.plan, name, recipe.seed).layers) == 3


def test_the_promised_recipes_are_there():
    systems = (
        "transmla mha2mla x-ecomla zebra-llama hylo mamba-in-llama mohawk matvlm mmmamba lolcats liger radlads halo longgen "
        "lighttransfer duo-attention palu nha olmo-hybrid samba-y demo"
    )
    assert set(MIXERS.names()) - {"attention", "block_sparse", "streaming_heads", "low_rank_kv", "gmu"} <= set(builtin_recipes())
    assert {"block-sparse", "streaming-heads", "low-rank-kv", *systems.split()} <= set(builtin_recipes())


def test_a_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe("mamba2")
    path = tmp_path / "r.yaml"
    path.write_text(recipe.resolved())
    assert load_recipe(path) == recipe


def test_set_overrides_any_key():
    recipe = load_recipe("streaming", ["plan.keep=all", "plan.mixer.window_tokens=4096", "distill.0.lr=1e-5", "seed=3"])
    assert recipe.plan == {"keep": "all", "mixer": {"name": "streaming", "sink_tokens": 4, "window_tokens": 4096}}
    assert recipe.distill[0]["lr"] == 1e-5
    assert recipe.seed == 3
    assert load_recipe("streaming", ["data.held_out_share=0.1"]).data.held_out_share == 0.1


LLAMA_1B = ("llama", {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8})
LLAMA_3B = ("llama", {"num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8})
LLAMA_8B = ("llama", {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8})
QWEN_1B = (
    "qwen3",
    {"num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
)


@pytest.mark.parametrize(
    ("recipe", "base", "percent"),
    [
        ("zebra-llama", LLAMA_1B, "3.91"),
        ("zebra-llama", LLAMA_3B, "2.01"),
        ("zebra-llama", LLAMA_8B, "2.73"),
        ("hylo", LLAMA_1B, "3.91"),
        ("hylo", LLAMA_3B, "4.69"),
        ("hylo", QWEN_1B, "7.81"),
        ("x-ecomla", LLAMA_1B, "9.38"),
    ],
)
def test_published_kv_shares(recipe, base, percent, tmp_path):
    """The published figures; 8B: 8 of 32 layers cache 160 + 64 numbers a token where the base caches 2,048."""
    family, sizes = base
    fields = {**sizes, "vocab_size": 64, "intermediate_size": 64, "dtype": "bfloat16"}
    AutoConfig.for_model(family, **fields).save_pretrained(tmp_path)
    found = describe_base(tmp_path)
    chosen = load_recipe(recipe, config=found.config)
    made = plan(found, chosen.plan, recipe, 0)
    assert f"{100 * made.kv_share:.2f}" == percent
    assert made.base_state_bytes["4096"] == 4096 * 2 * 2 * sizes["num_hidden_layers"] * 8 * (
        sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    )


SIZED = """
name: sized
plan: {keep: all}
distill: [{name: kl, tokens: 1000, seq_tokens: 8, rows: 1, lr: 1e-3}]
sizes:
  - when: {num_hidden_layers: 3, hidden_size: 64}
    set: {plan.keep: {layers: [0]}}
  - when: {num_hidden_layers: 3}
    set: {plan.keep: {every: 2}, distill.0.lr: 5e-4}
"""


def test_sizes_are_settled_by_the_base_and_overridden_by_the_user(bases, tmp_path):
    path = tmp_path / "sized.yaml"
    path.write_text(SIZED)
    config = open_base(bases["llama"]).config
    assert len(load_recipe(path).sizes) == 2
    settled = load_recipe(path, config=config)
    assert (settled.plan, settled.distill[0]["lr"], settled.sizes) == ({"keep": {"every": 2}}, 5e-4, [])
    assert load_recipe(path, ["plan.keep={first: 1}"], config).plan == {"keep": {"first": 1}}
    config.num_hidden_layers = 9
    assert load_recipe(path, config=config).plan == {"keep": "all"}
    path.write_text(SIZED.replace("distill.0.lr", "distill.4.lr"))
    config.num_hidden_layers = 3
    with pytest.raises(ConfigError, match=r"sizes distill\.4\.lr: '4' is no place in a list of 1"):
        load_recipe(path, config=config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plan", "expected key=value"),
        ("distill.7.lr=1", "no place in a list"),
        ("nmae=x", "unknown key 'nmae'"),
        ("data.held_out_shar=0.1", "Did you mean 'held_out_share'"),
        ("data.held_out_share=2", "less than 1"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=true", "seed"),
        ("name.x=1", "name"),
        ("plan.keep={a: 1, a: 2}", "given twice"),
        ("plan.keep=[", "not valid YAML"),
    ],
)
def test_bad_overrides(override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe("mamba2", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nname: y\nplan: {}\n", "line 2: the key 'name' is given twice"),
        ("name: &a x\nplan: {b: *a}\n", "anchors and aliases"),
        ("name: !!python/object/apply:os.system [true]\nplan: {}\n", "not valid YAML"),
        ("- a\n", "holds list"),
        ("plan: {}\n", "name"),
        ("name: x\n", "plan"),
        ("name: [", "not valid YAML"),
        ("name: x\nplan: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("# " + "x" * MAX_BYTES, "expected a recipe of at most"),
    ],
)
def test_bad_files(text, words, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_and_component():
    with pytest.raises(ConfigError, match="Did you mean 'mamba2'"):
        load_recipe("mamba3")
    with pytest.raises(ConfigError, match="unknown stage 'algin'.*Did you mean 'align'"):
        check_components(load_recipe("mamba2", ["distill.0.name=algin"]))
    with pytest.raises(ConfigError, match="unknown option 'lrr'"):
        check_components(load_recipe("mamba2", ["distill.0.lrr=1"]))
    with pytest.raises(ConfigError, match="unknown gate"):
        check_components(load_recipe("mamba2", ["gates.0.name=nope"]))
