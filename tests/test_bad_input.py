"""Every kind of bad input: one line that says what, where and what next; nothing left under the output's name."""

import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from hybridize.core import Plan
from hybridize.errors import CheckpointError, ConfigError, HybridizeError
from tests.tiny import tiny_base

torch.set_num_threads(1)

SECTION = {"keep": {"every": 2}, "mixer": {"name": "streaming"}}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A base in one file and one in several."""
    folder = tmp_path_factory.mktemp("bases")
    return tiny_base("llama", folder / "one"), tiny_base("llama", folder / "many", max_shard_size="30KB")


@pytest.fixture
def single(originals, tmp_path):
    return shutil.copytree(originals[0], tmp_path / "base")


@pytest.fixture
def sharded(originals, tmp_path):
    return shutil.copytree(originals[1], tmp_path / "base")


def refused(base, pattern, error=CheckpointError):
    """The whole line, base to hybrid, ends in one line of ours and leaves nothing beside the base."""
    before = sorted(os.listdir(base.parent))
    start = time.monotonic()
    with pytest.raises(error, match=pattern) as caught:
        convert(plan(open_base(base), SECTION, "test", 0), base.parent / "out")
    assert time.monotonic() - start < 5
    assert isinstance(caught.value, HybridizeError)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(base.parent)) == before


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def edit_tensors(base, **changes):
    tensors = load_file(base / WEIGHTS)
    tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    save_file({name: t for name, t in tensors.items() if t is not None}, base / WEIGHTS, {"format": "pt"})


def edit_header(base, old, new):
    """Change the header in place, keeping the length field true."""
    data = (base / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = re.sub(old, new, data[8 : 8 + length].decode(), count=1).encode()
    (base / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def shard(base, number=1):
    return sorted(base.glob("model-*.safetensors"))[number]


@pytest.mark.parametrize("which", [0, 1])
def test_the_bases_themselves_are_fine(originals, which, tmp_path):
    convert(plan(open_base(originals[which]), SECTION, "test", 0), tmp_path / "out")
    assert (tmp_path / "out" / "lineage.json").exists()


def test_truncated_shard(sharded):
    os.truncate(shard(sharded), shard(sharded).stat().st_size - 1)
    refused(sharded, r"model-00002-of-\d+\.safetensors: has \d+ bytes, expected \d+ by its header: truncated")


@pytest.mark.parametrize("length", [0, 4, 40])
def test_cut_to_almost_nothing(single, length):
    os.truncate(single / WEIGHTS, length)
    refused(single, r"model\.safetensors: ")


def test_bytes_left_over(single):
    with open(single / WEIGHTS, "ab") as stream:
        stream.write(b"\0")
    refused(single, "bytes left over")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (r'"data_offsets":\[0,(\d+)\]', r'"data_offsets":[0,\g<1>0]', "spans"),
        (r'"data_offsets":\[0,', '"data_offsets":[-4,', "not a list of integers >= 0"),
        (r'"shape":\[64,32\]', '"shape":[64,31]', "spans"),
        (r'"shape":\[64,32\]', '"shape":[64,1e9]', "shape is not a list"),
        (r'"shape":\[64,32\]', '"shape":[true,2048]', "shape is not a list"),
        (r'"dtype":"F32"', '"dtype":"F33"', "got dtype 'F33'"),
        (r'"dtype":"F32",', "", "is not dtype, shape and data_offsets"),
        (r'"model\.norm\.weight"', '"model.embed_tokens.weight"', "'model.embed_tokens.weight' is given twice"),
        (r"^\{", "[", "not valid JSON"),
        (r"^.*$", "[" * 5000, "not valid JSON"),
        (r"^.*$", "[]", "the header is a list"),
        (r'"shape":\[64,32\]', '"shape":[NaN,32]', "NaN is not JSON"),
    ],
)
def test_header_that_lies(single, old, new, says):
    edit_header(single, old, new)
    refused(single, re.escape(says))


def test_tensors_that_overlap(single):
    data = (single / WEIGHTS).read_bytes()
    norms = re.findall(rb'(layernorm\.weight":\{"dtype":"F32","shape":\[32\],"data_offsets":)(\[\d+,\d+\])', data)
    (single / WEIGHTS).write_bytes(data.replace(norms[1][1], norms[0][1].ljust(len(norms[1][1]))))
    refused(single, "overlap or hole")


def test_header_length_beyond_all_bounds(single):
    data = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_bytes((2**63).to_bytes(8, "little") + data[8:])
    refused(single, "the header claims 9223372036854775808 bytes")


def test_missing_tensor(single):
    edit_tensors(single, model__norm__weight=None)
    refused(single, r"tensor 'model\.norm\.weight' is missing")


def test_extra_tensor(single):
    edit_tensors(single, model__layers__0__self_attn__sinks=torch.zeros(4))
    refused(single, r"tensor 'model\.layers\.0\.self_attn\.sinks' is extra")


def test_misshapen_tensor(single):
    edit_tensors(single, model__norm__weight=torch.zeros(33))
    refused(single, r"tensor 'model\.norm\.weight' has shape \[33\], expected \[32\]")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", 7, "x\0y"])
def test_index_that_leads_out(sharded, name):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded.parent / "other.safetensors").write_bytes(shard(sharded).read_bytes())
    edit_json(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": name})
    refused(sharded, "expected a plain name inside the folder")


def test_index_with_a_tensor_nowhere(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map={**weight_map, "ghost": shard(sharded).name})
    refused(sharded, "tensor 'ghost' is missing in model-00002")


def test_index_that_names_another_shard(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    names = [name for name, file in weight_map.items() if file == shard(sharded).name]
    edit_json(sharded / INDEX, weight_map={**weight_map, names[0]: shard(sharded, 0).name})
    refused(sharded, "but the index says 'model-00001")


def test_tensor_in_two_shards(sharded):
    first, second = load_file(shard(sharded, 0)), load_file(shard(sharded, 1))
    name = next(iter(first))
    save_file({**second, name: first[name]}, shard(sharded, 1), {"format": "pt"})
    refused(sharded, f"tensor '{re.escape(name)}' is in model-00001.* and in model-00002")


def test_shard_that_is_absent(sharded):
    os.remove(shard(sharded))
    refused(sharded, r"model-00002-of-\d+\.safetensors: no such file")


def test_index_and_single_file_together(sharded):
    save_file({}, sharded / WEIGHTS)
    refused(sharded, "holds both")


def test_shard_that_is_a_link_to_elsewhere(single):
    os.rename(single / WEIGHTS, single.parent / "elsewhere")
    (single / WEIGHTS).symlink_to(single.parent / "elsewhere")
    refused(single, "is a link to .*elsewhere, expected a file inside the folder")


def test_shard_that_is_a_pipe(single):
    os.remove(single / WEIGHTS)
    os.mkfifo(single / WEIGHTS)
    refused(single, "not an ordinary file")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": ...}, "model_type is None"),
        ({"model_type": "bamba", "time_step_limit": [0, float("inf")]}, "model_type is 'bamba', expected one of llama"),
        ({"rms_norm_eps": float("nan")}, "holds NaN or Infinity"),
        ({"auto_map": {"AutoModel": "m.M"}}, "runs code from its repository"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights cannot be converted"),
        ({"hidden_size": -1}, "hidden_size is -1, expected an integer from 1"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads = 3"),
        ({"head_dim": 1.5}, "cannot be used"),
        ({"hidden_act": "rm -rf"}, "hidden_act is 'rm -rf'"),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1.0}}, "rope_type is 'odd'"),
        ({"dtype": "int4"}, "dtype is 'int4', expected one of bfloat16"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window is 16"),
        ({"num_hidden_layers": 4}, "tensor 'model.layers.3"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_config_that_cannot_be_used(single, changes, says):
    edit_json(single / "config.json", **changes)
    refused(single, re.escape(says))


def test_config_that_is_no_json(single):
    (single / "config.json").write_text('{"model_type": "llama", "model_type": "qwen2"}')
    refused(single, "'model_type' is given twice")
    os.remove(single / "config.json")
    refused(single, r"config\.json: no such file")


def test_windowed_qwen(tmp_path):
    base = tiny_base("qwen2", tmp_path, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    refused(base, "bases whose own attention is windowed are not supported")


def test_gptq_tensors(single):
    name = "model.layers.0.self_attn.q_proj."
    edit_tensors(single, **{f"{name}weight": None, f"{name}qweight": torch.zeros(4, 32, dtype=torch.int32)})
    refused(single, r"q_proj\.qweight' \(int32\) is of quantised weights")


def test_fp8_tensors(single):
    edit_tensors(single, model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn))
    refused(single, "float8_e4m3fn.* is of quantised weights")


def test_pickled_weights(single):
    canary = single.parent / "canary"
    os.remove(single / WEIGHTS)
    (single / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
    refused(single, r"pytorch_model\.bin is pickled weights")
    assert not canary.exists()
    os.remove(single / "pytorch_model.bin")
    refused(single, "holds neither")


def test_no_such_folder(tmp_path):
    refused(tmp_path / "absent", "no such folder")


def test_output_that_is_not_empty(single):
    out = single.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(single, "out: the output is not empty", ConfigError)
    assert os.listdir(out) == ["thesis.txt"]


def test_output_inside_the_base(single):
    with pytest.raises(ConfigError, match="lies inside the base"):
        convert(plan(open_base(single), SECTION, "test", 0), single / "out")


def test_no_space_left(single, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=512))
    refused(single, r"no space left: 0\.\d+ GB are needed, 0\.000 GB are available", ConfigError)


def test_disk_that_fills_up_on_the_way(single, monkeypatch):
    def full(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    refused(single, "model.safetensors: cannot be written: no space left on the device", ConfigError)


def test_plan_of_another_base(single, tmp_path):
    made = plan(open_base(single), SECTION, "test", 0)
    edit_json(single / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match="is not the base the plan was made for"):
        convert(made, tmp_path / "out")


def test_plan_file_that_was_edited(single, tmp_path):
    made = plan(open_base(single), SECTION, "test", 0).to_dict()
    made["layers"] = made["layers"][:-1]
    with pytest.raises(CheckpointError, match="has 3 layers of llama, the plan 2 of llama"):
        convert(Plan.from_dict(made), tmp_path / "out")


def test_hybrid_as_base(single, tmp_path):
    convert(plan(open_base(single), SECTION, "test", 0), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a hybrid already"):
        open_base(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", mixers=[{"name": "streaming"}], made_for_sha256=None)
    with pytest.raises(CheckpointError, match="mixers has 1 entries, expected num_hidden_layers = 3"):
        open_base(tmp_path / "out")
