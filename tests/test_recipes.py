import pytest

from hybridize.checkpoint import open_base
from hybridize.conversions import plan
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
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
    assert {"mamba2", "streaming", "mamba-in-llama", "lighttransfer", "demo"} <= set(builtin_recipes())


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
