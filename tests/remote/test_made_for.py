"""config.json names its code, and is refused where it was edited into what the weights were not made for."""

import copy
import hashlib
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from hybridize.checkpoint import load_model, open_base, open_checkpoint, save_changed, save_checkpoint
from hybridize.config import CODE_FILE
from hybridize.errors import CheckpointError, ConfigError
from hybridize.lineage import read_lineage, verify_files
from hybridize.modeling import HYBRIDS, build_model, hybrid_config
from hybridize.remote import bundle
from hybridize.storage import Staging
from tests.remote.hybrids import KEEP, config_of, model_of
from tests.remote.test_bundle import file_of
from tests.tiny import tiny_base

NEAR = {"name": "streaming", "sink_tokens": 1, "window_tokens": 5}
WIDER = {**NEAR, "window_tokens": 6}
SPECS = [NEAR, KEEP, NEAR]
OTHERS = HYBRIDS["mistral"][0].own_auto_map()

# (what is edited, what it says); every tensor has its name and shape still.
EDITS = [
    ({"mixers": [NEAR, KEEP, WIDER]}, "mixers is not what the weights were made for"),
    ({"mixers": [KEEP, KEEP, KEEP]}, "mixers is not what the weights were made for"),
    ({"architectures": ["HybridMistralForCausalLM"]}, "model_type 'hybrid_llama' with architectures .*Mistral.* is not what"),
    ({"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, "one of hidden_size, .*head_dim.* is not what"),
    ({"hidden_act": "gelu"}, "one of hidden_size, .* is not what"),
    ({"rms_norm_eps": 1e-3}, "one of hidden_size, .* is not what"),
    (
        {"made_for_sha256": "5874701deb35"},
        "made_for_sha256 is '5874701deb35', expected a sha256 for each of class, mixers, sizes",
    ),
    ({"made_for_sha256": {}}, "made_for_sha256 is {}, expected a sha256 for each"),
]
CLASSES = [
    # model_type, auto_map, what our loader says, what a class that is asked says.
    (
        "llama",
        "own",
        "model_type is 'llama', but made_for_sha256 says .* a hybrid's; expected 'hybrid_llama'",
        "is 'llama', expected",
    ),
    ("hybrid_mistral", "own", "auto_map is .*HybridLlama.*, expected that of hybrid_mistral", "is 'hybrid_mistral', expected"),
    ("hybrid_mistral", OTHERS, "model_type 'hybrid_mistral' with architectures .* is not what", "is 'hybrid_mistral', expected"),
    ("qwen2", None, "model_type is 'qwen2', but made_for_sha256 says", "is 'qwen2', expected 'hybrid_llama'"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hybrid"
    model_of("llama", SPECS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(saved):
    yield from file_of(saved, "modeling_alone_too")


@pytest.fixture
def edited(saved, tmp_path):
    """A copy of the directory whose config.json is changed; ... takes a field away."""
    folder = tmp_path / "edited"

    def edit(**changes):
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        fields = {**json.loads((saved / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
        return folder

    return edit


def logits(model):
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize(("changes", "says"), EDITS, ids=lambda one: next(iter(one)) if isinstance(one, dict) else "")
def test_an_edited_config_is_refused_by_the_package_and_by_the_file(changes, says, edited, alone):
    folder = edited(**changes)
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{says}"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(alone.ConfigError, match=rf"^config\.json: .*{says}"):
        alone.HybridLlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"config\.json: cannot be used: (?!config).*{says}") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert "onvert again" in str(error.value)


@pytest.mark.parametrize(("model_type", "auto_map", "loader_says", "class_says"), CLASSES)
def test_a_config_of_another_class_is_refused(model_type, auto_map, loader_says, class_says, edited, alone):
    folder = edited(model_type=model_type, **({} if auto_map == "own" else {"auto_map": auto_map or ...}))
    with pytest.raises(CheckpointError, match=loader_says):
        open_checkpoint(folder)
    # What trust_remote_code=True does with our map: the class in the file is asked, whatever model_type says.
    with pytest.raises(alone.ConfigError, match=class_says):
        alone.HybridLlamaConfig.from_pretrained(folder)
    with pytest.raises(ConfigError, match=class_says):
        AutoConfig.for_model("hybrid_llama").from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_map_that_leaves_our_config_out(edited, alone):
    """Transformers then has a LlamaConfig made, and asks our model with it."""
    folder = edited(model_type="llama")
    config = AutoConfig.from_pretrained(folder)
    for module in (alone, sys.modules["hybridize.modeling"]):
        for name in ("HybridLlamaForCausalLM", "HybridLlamaModel"):
            with pytest.raises(ValueError, match=r"^config\.json: model_type is 'llama', expected 'hybrid_llama'"):
                getattr(module, name).from_pretrained(folder, config=config)


@pytest.mark.filterwarnings("ignore")
def test_what_nobody_asks_us_about(saved, edited):
    """Called a llama, transformers' own class reads it without a word to us, and is wrong; ours say so."""
    folder = edited(model_type="llama")
    wrong = AutoModelForCausalLM.from_pretrained(folder)
    assert type(wrong) is LlamaForCausalLM
    assert not torch.allclose(logits(wrong), logits(AutoModelForCausalLM.from_pretrained(saved)), atol=1e-3)
    for open_it in (open_checkpoint, open_base, load_model):
        with pytest.raises(CheckpointError, match="expected 'hybrid_llama'. Restore config.json or convert again"):
            open_it(folder)


def test_without_the_check_it_would_be_read_wrong(saved, edited):
    """A wider window has tensors of the same names and shapes; taking made_for_sha256 away is how one says that it is meant."""
    folder = edited(mixers=[NEAR, KEEP, WIDER], made_for_sha256=...)
    knowingly = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(logits(knowingly), logits(AutoModelForCausalLM.from_pretrained(saved)), atol=1e-3)
    knowingly.save_pretrained(folder)
    assert torch.equal(logits(load_model(folder)), logits(knowingly))
    assert json.loads((folder / "config.json").read_text())["made_for_sha256"] == knowingly.config.made_for()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"bos_token_id": 5, "use_cache": False, "dtype": "bfloat16", "transformers_version": "5.0.0"},
        {"auto_map": ...},
        {"made_for_sha256": ..., "auto_map": ...},
    ],
    ids=str,
)
def test_what_may_change_beside_the_same_weights(changes, edited, alone):
    folder = edited(**changes)
    assert open_checkpoint(folder).is_hybrid
    assert alone.HybridLlamaConfig.from_pretrained(folder).mixers == SPECS


@pytest.mark.parametrize(
    "auto_map", [{"AutoConfig": "evil.E"}, {"AutoModelForCausalLM": "them/theirs--modeling_hybridize.X"}, None, []]
)
def test_code_of_others_is_refused(auto_map, edited, saved):
    own = json.loads((saved / "config.json").read_text())["auto_map"]
    folder = edited(auto_map={**own, **auto_map} if isinstance(auto_map, dict) else auto_map)
    with pytest.raises(CheckpointError, match="auto_map is .*, expected that of hybrid_llama"):
        open_checkpoint(folder)


def test_nothing_in_a_directory_is_run(saved, edited):
    folder = edited()
    (folder / CODE_FILE).write_text("raise SystemExit('was run')\n")
    assert torch.equal(logits(load_model(folder)), logits(AutoModelForCausalLM.from_pretrained(saved)))
    # Nor where somebody asks for it: the package's classes come first.
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__ == "hybridize.modeling"


def test_a_config_edited_in_memory_is_refused_when_a_model_is_made_of_it(saved, alone):
    for config_class, causal in (
        (HYBRIDS["llama"][0], HYBRIDS["llama"][2]),
        (alone.HybridLlamaConfig, alone.HybridLlamaForCausalLM),
    ):
        config = config_class.from_pretrained(saved)
        causal(config)
        config.mixers = [NEAR, KEEP, WIDER]
        with pytest.raises(ValueError, match="mixers is not what the weights were made for"):
            causal(config)
        config.made_for_sha256 = None
        causal(config)
        config = config_class.from_pretrained(saved, num_attention_heads=8, head_dim=4)
        with pytest.raises(ValueError, match="one of hidden_size"):
            causal(config)


def test_hashes_follow_a_config_that_is_made_anew(saved):
    read = AutoConfig.from_pretrained(saved)
    assert read.made_for_sha256 == read.made_for()
    other = hybrid_config(read, [KEEP, NEAR, KEEP])
    assert other.made_for_sha256 is None
    build_model(other)
    fields = other.to_dict()
    assert fields["made_for_sha256"] != read.made_for_sha256
    assert {part for part in fields["made_for_sha256"] if fields["made_for_sha256"][part] != read.made_for_sha256[part]} == {
        "mixers"
    }
    assert type(other).from_dict(json.loads(other.to_json_string())).mixers == other.mixers
    copied = copy.deepcopy(read)
    copied.made_for_sha256, copied.mixers = None, other.mixers
    assert json.loads(copied.to_json_string())["made_for_sha256"] == fields["made_for_sha256"]


def test_a_resized_vocabulary_and_a_decoder_alone_are_saved_right(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.resize_token_embeddings(70)
    build_model(model.config)
    model.save_pretrained(tmp_path / "wide")
    assert open_checkpoint(tmp_path / "wide").config.vocab_size == 70
    decoder = AutoModel.from_pretrained(saved)
    decoder.save_pretrained(tmp_path / "decoder")
    again = AutoModel.from_pretrained(tmp_path / "decoder")
    assert again.config.architectures == ["HybridLlamaModel"]
    type(again)(again.config)


def test_every_way_of_saving_carries_the_code(saved, tmp_path):
    """By transformers, of a live model, and of a directory with changed tensors: the same file, listed and hashed."""
    base = tiny_base("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(saved)
    with Staging(tmp_path / "live", False, "job") as staging:
        save_checkpoint(model, base, staging, {"base": {}})
        staging.finish()
    with Staging(tmp_path / "changed", False, "job") as staging:
        save_changed(open_checkpoint(tmp_path / "live"), {}, staging, {"base": {}})
        staging.finish()
    text = bundle(model.config)
    for folder in (saved, tmp_path / "live", tmp_path / "changed"):
        assert (folder / CODE_FILE).read_text() == text
        fields = json.loads((folder / "config.json").read_text())
        assert fields["auto_map"] == HYBRIDS["llama"][0].own_auto_map()
        assert fields["made_for_sha256"] == model.config.made_for()
    for folder in (tmp_path / "live", tmp_path / "changed"):
        assert CODE_FILE in read_lineage(folder)["files"]
        verify_files(folder)
        (folder / CODE_FILE).write_text(text + "\n")
        with pytest.raises(CheckpointError, match=rf"{CODE_FILE}: is absent or was changed"):
            verify_files(folder)
    assert not (base / CODE_FILE).exists()


def test_hashes_are_of_what_they_say():
    """Written out by hand: whatever changes them would refuse checkpoints of before."""
    stem = "modeling_hybridize.HybridQwen2"
    texts = {
        "class": f'["hybrid_qwen2", ["HybridQwen2ForCausalLM"], {{"AutoConfig": "{stem}Config", "AutoModel": "{stem}Model", '
        f'"AutoModelForCausalLM": "{stem}ForCausalLM"}}]',
        "mixers": '[[{"name": "mamba2", "proj_bias": false}, {"name": "attention"}, {"name": "attention"}]]',
        "sizes": '[32, 48, 3, 4, 2, 8, "silu", 1e-06, null, null, null]',
    }
    found = config_of("qwen2", [{"proj_bias": False, "name": "mamba2"}, KEEP, KEEP]).made_for()
    assert found == {part: hashlib.sha256(text.encode()).hexdigest() for part, text in texts.items()}
