"""Reading: what is believed of a directory, and that it is exactly what others read. Writing: that it comes back."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hybridize.checkpoint import describe_base, load_model, open_base, open_checkpoint, save_checkpoint
from hybridize.conversions import convert, plan
from hybridize.errors import CheckpointError, HybridizeError
from hybridize.families import FAMILIES
from hybridize.lineage import is_complete, read_lineage, verify_files
from hybridize.modeling import build_model, hybrid_config
from hybridize.shards import Planned, _aligned, plan_shards, read_header, read_tensor, tensor_bytes, write_shard
from hybridize.storage import Staging
from tests.tiny import tiny_base

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_base("llama", tmp_path_factory.mktemp("base"), max_shard_size="30KB")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_safetensors_reads(family, tied, tmp_path):
    path = tiny_base(family, tmp_path, tie_word_embeddings=tied)
    base = open_base(path)
    stored = load_file(path / "model.safetensors")
    assert base.family == family
    assert base.tensors.keys() == stored.keys()
    assert ("lm_head.weight" in stored) != tied
    assert all(torch.equal(base.read(name), tensor) for name, tensor in stored.items())
    assert torch.equal(base.layer(1)["self_attn.q_proj.weight"], stored["model.layers.1.self_attn.q_proj.weight"])
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        assert torch.equal(load_model(path)(ids).logits, theirs)


def test_sharded_base_is_one(llama):
    assert len({info.file for info in open_base(llama).tensors.values()}) > 1
    assert load_model(llama).dtype == torch.float32
    assert load_model(llama, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.fixture
def config_alone(llama, tmp_path):
    folder = tmp_path / "config-alone"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    return folder


def test_a_plan_needs_config_json_only(llama, config_alone, tmp_path):
    section = {"keep": {"layers": [1]}, "mixer": {"name": "mamba2", "method": "mimetic"}}
    early, late = plan(describe_base(config_alone), section, "test", 0), plan(open_base(llama), section, "test", 0)
    assert early.digest() == late.digest()
    convert(early, tmp_path / "early", base_path=llama)
    convert(late, tmp_path / "late")
    assert load_file(tmp_path / "early" / "model.safetensors").keys() == load_file(tmp_path / "late" / "model.safetensors").keys()
    with pytest.raises(CheckpointError, match="expected safetensors weights"):
        convert(early, tmp_path / "out")


def test_config_alone_must_name_a_dtype(config_alone):
    config = json.loads((config_alone / "config.json").read_text())
    (config_alone / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    with pytest.raises(CheckpointError, match="names no dtype"):
        describe_base(config_alone)


def test_weights_that_are_there_are_checked(llama, config_alone):
    shutil.copy(next(llama.glob("model-00001*")), config_alone / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        describe_base(config_alone)


def test_hash_follows_config_and_headers(llama, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    assert open_base(copy).hash == open_base(llama).hash
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert open_base(copy).hash != open_base(llama).hash


def test_old_rotary_buffers_are_named_and_ignored(tmp_path):
    path = tiny_base("llama", tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path / "model.safetensors"), name: torch.ones(4)}, path / "model.safetensors", {"format": "pt"})
    assert open_base(path).ignored == (name,)


def test_tied_matrix_may_be_stored_under_either_name_or_both(tmp_path):
    path = tiny_base("llama", tmp_path, tie_word_embeddings=True)
    stored = load_file(path / "model.safetensors")
    matrix = stored.pop("model.embed_tokens.weight")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = load_model(path)(ids).logits
        for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
            save_file({**stored, **{name: matrix.clone() for name in names}}, path / "model.safetensors", {"format": "pt"})
            base = open_base(path)
            assert torch.equal(base.read("model.embed_tokens.weight"), matrix)
            assert torch.equal(load_model(path)(ids).logits, expected)
            out = tmp_path / f"out-{len(names)}"
            convert(plan(base, {"keep": "all"}, "test", 0), out)
            assert load_file(out / "model.safetensors").keys() == base.tensors.keys()
            assert torch.equal(load_model(out)(ids).logits, expected)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is missing"):
        open_base(path)


def test_hub_cache_links_are_let_through(llama, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(llama, blobs)
    snapshot.mkdir(parents=True)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert open_base(snapshot).hash == open_base(llama).hash


def test_companions_go_along(tmp_path):
    path = tiny_base("llama", tmp_path)
    for name in ("tokenizer.json", "LICENSE.txt", "USE_POLICY.md", "notes.txt"):
        (path / name).write_text("{}")
    assert open_base(path).other_files == ("LICENSE.txt", "USE_POLICY.md", "generation_config.json", "tokenizer.json")


def mutated(rng, data):
    """One or two small changes to a file's header or length."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        kind = rng.randrange(4)
        at = rng.randrange(min(len(data), 400))
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = bytes(rng.choices(b'0123456789[]{},:"-eE ', k=rng.randint(1, 5)))
        else:
            del data[rng.randrange(len(data)) :]
            data = data or bytearray(b"\0")
    return bytes(data)


def test_mutated_headers_are_refused_or_true(tmp_path):
    """Whatever is done to a header: an error of ours, or tensors that lie inside the file and do not overlap."""
    rng = random.Random(0)
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.float16)}, path)
    original = path.read_bytes()
    refused = 0
    for _ in range(600):
        path.write_bytes(mutated(rng, original))
        try:
            tensors, _ = read_header(path)
        except CheckpointError:
            refused += 1
        else:
            spans = sorted((info.offset, info.offset + info.nbytes) for info in tensors.values())
            assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert not spans or spans[-1][1] == path.stat().st_size
            for info in tensors.values():
                assert read_tensor(info).shape == info.shape
    assert refused > 400


def test_file_cut_while_open_raises(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    info = read_header(path)[0]["a"]
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match="ended at byte 2000 while being read"):
        read_tensor(info)


def test_shards_keep_groups_whole_and_tensors_aligned(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = {}
    for group in range(5):
        values[f"g{group}.odd"] = torch.randn(3, 7, generator=generator).to(torch.bfloat16)
        values[f"g{group}.wide"] = torch.randn(5, generator=generator)
    planned = [Planned(name=n, dtype=t.dtype, shape=tuple(t.shape), group=n[:2]) for n, t in values.items()]
    shards = plan_shards(planned, limit=130)
    assert [len({t.group for t in shard.tensors}) for shard in shards] == [2, 2, 1]
    read = {}
    for shard in shards:
        record = write_shard(tmp_path, shard, lambda tensor: [tensor_bytes(values[tensor.name])])
        assert record["bytes"] == (tmp_path / shard.name).stat().st_size == shard.nbytes
        infos, _ = read_header(tmp_path / shard.name)
        assert all(info.offset % info.dtype.itemsize == 0 for info in infos.values())
        read |= load_file(tmp_path / shard.name)
    assert all(torch.equal(read[name], tensor) for name, tensor in values.items())
    # In the order given, the fp32 tensor after an odd number of bf16 ones would be misaligned.
    assert planned[0].nbytes % 4 != 0
    assert [t.name for t in _aligned(planned[:2])] == ["g0.wide", "g0.odd"]


def hybrid(path, mixer):
    torch.manual_seed(0)
    config = hybrid_config(open_base(path).config, [mixer, {"name": "attention"}, mixer])
    return build_model(config).eval()


@pytest.mark.parametrize("mixer", [{"name": "streaming", "window_tokens": 5}, {"name": "mamba2"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_hybrid_comes_back(mixer, dtype, tmp_path):
    base = tiny_base("llama", tmp_path, dtype=dtype)
    (base / "tokenizer.json").write_text("{}")
    model = hybrid(base, mixer)
    out = tmp_path / "out"
    assert not is_complete(out)
    with Staging(out, False, "job") as staging:
        save_checkpoint(model, base, staging, {"verb": "distill", "base": {"hash": "h"}})
        staging.finish()
    verify_files(out)
    assert read_lineage(out)["base"] == {"hash": "h"}
    assert (out / "tokenizer.json").exists()
    loaded = load_model(out)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        wanted = torch.float32 if name.endswith(("A_log", "dt_bias", "D")) else getattr(torch, dtype)
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, expected[name].to(wanted)), name


def test_values_that_are_not_finite_are_never_saved(llama, tmp_path):
    model = hybrid(llama, {"name": "streaming"})
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds a value that is not finite"):
        with Staging(tmp_path / "out", False, "job") as staging:
            save_checkpoint(model, llama, staging, {"base": {}})
    assert os.listdir(tmp_path) == []


def test_changed_output_is_found_by_its_hash(llama, tmp_path):
    out = tmp_path / "out"
    with Staging(out, False, "job") as staging:
        save_checkpoint(hybrid(llama, {"name": "streaming"}), llama, staging, {"base": {}})
        staging.finish()
    verify_files(out)
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    open_checkpoint(out)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is absent or was changed"):
        verify_files(out)


def test_lineage_of_others_is_refused(llama, tmp_path):
    with pytest.raises(HybridizeError, match=r"lineage\.json: no such file"):
        read_lineage(llama)
    (tmp_path / "lineage.json").write_text("[]")
    with pytest.raises(CheckpointError, match="has no base or files"):
        read_lineage(tmp_path)
