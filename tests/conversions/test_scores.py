"""Layer scores against their definitions in fp64, and the document's form."""

import copy
import dataclasses
import inspect
import json
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.conversions import SCORES, plan, score
from hybridize.conversions.job import Job
from hybridize.conversions.plan import build_mixer, candidates_of
from hybridize.conversions.ranks import request_of
from hybridize.conversions.scores import fisher
from hybridize.conversions.scores.energy import SHARES, least_rank, ranks_reaching
from hybridize.conversions.table import CONVERSIONS
from hybridize.core import LayerScore, Scores, ScoreTable
from hybridize.data import Tokens
from hybridize.errors import CheckpointError, ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tolerances import assert_close, rms_ratio


def whole_model(base, ids):
    """Mean square root of the Fisher information by autograd over the whole model in fp64: right, and wrong twice."""
    model = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager").double().eval()
    squares, plain, shifted = {}, {}, {}
    for row in ids:
        for sums, labels, power in ((squares, row[1:], 2), (plain, row[1:], 1), (shifted, row[2:], 2)):
            model.zero_grad()
            logits = model(row[None]).logits[0, : len(labels)]
            torch.nn.functional.cross_entropy(logits, labels).backward()
            for name, parameter in model.named_parameters():
                if name.endswith(("k_proj.weight", "v_proj.weight")):
                    sums[name] = sums.get(name, 0) + parameter.grad**power
    return (
        {name: (total / len(ids)).sqrt().mean() for name, total in squares.items()},
        {name: (total / len(ids)).abs().mean() for name, total in plain.items()},
        {name: (total / len(ids)).sqrt().mean() for name, total in shifted.items()},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_that_of_the_whole_model(family, bases, text, monkeypatch):
    """Per sample, squared, then averaged; not the batch's gradient squared, and labels shifted once. In any number of turns."""
    base = bases[family]
    rows = SCORES.build({"name": "fisher", "tokens": 24})(base, text, None, lambda *a: None)
    ids = torch.cat([torch.full((11, 1), 1), torch.from_numpy(text.ids).long().view(11, 23)], dim=1)
    right, *wrong = whole_model(base, ids)

    def stacked(values):
        return torch.stack([values[f"model.layers.{i}.self_attn.{p}.weight"] for i in range(3) for p in ("k_proj", "v_proj")])

    found = torch.tensor([row.values[part] for row in rows for part in ("k_proj", "v_proj")])
    assert_close(found, stacked(right), "fp32", grad=True)
    for other in wrong:
        assert rms_ratio(found, stacked(other)) > 5e-3
    monkeypatch.setattr(fisher, "KEPT_BYTES", 4 * 4 * 24 * 32 * 4)
    steps = []
    again = SCORES.build({"name": "fisher", "tokens": 24})(base, text, None, lambda *a: steps.append(a))
    assert steps == [(i, 18) for i in range(1, 19)]
    assert_close(torch.tensor([row.values[p] for row in again for p in ("k_proj", "v_proj")]), found, "fp32")


@pytest.mark.slow
def test_fishers_standard_error_is_the_jackknifes(bases, text):
    rows = SCORES.build({"name": "fisher", "tokens": 24})(bases["llama"], text, None, lambda *a: None)
    ids = torch.cat([torch.full((11, 1), 1), torch.from_numpy(text.ids).long().view(11, 23)], dim=1)
    name = "model.layers.1.self_attn.v_proj.weight"
    left_out = torch.stack(
        [whole_model(bases["llama"], ids[[i for i in range(11) if i % 8 != fold]])[0][name] for fold in range(8)]
    )
    expected = (7 / 8 * (left_out - left_out.mean()).square().sum()).sqrt()
    assert rows[1].stderr["v_proj"] == pytest.approx(float(expected), rel=1e-3)
    assert rows[1].stderr["v_proj"] < 0.5 * rows[1].values["v_proj"]
    one = SCORES.build({"name": "fisher", "tokens": 24, "samples": 1})(bases["llama"], text, None, lambda *a: None)
    assert one[0].stderr == {}


def test_one_layer_is_in_memory(bases, text, monkeypatch):
    alive, most = [], []
    read = fisher.decoder_layer

    def watched(base, index):
        layer = read(base, index)
        alive.append(weakref.ref(layer))
        most.append(sum(ref() is not None for ref in alive))
        return layer

    monkeypatch.setattr(fisher, "decoder_layer", watched)
    SCORES.build({"name": "fisher", "tokens": 24})(bases["llama"], text, None, lambda *a: None)
    assert most == [1] * 6


def test_a_tokenizer_that_is_not_the_bases_is_refused(bases):
    text = Tokens(ids=np.full(60, 64, dtype=np.int32), text_bytes=1, sha256="", bos_id=1)
    with pytest.raises(ConfigError, match="text has token 64, expected 0 to 63"):
        SCORES.build({"name": "fisher", "tokens": 24})(bases["llama"], text, None, lambda *a: None)


def cut(base, index, spec):
    """What a seed by plain decomposition leaves of the squared weights, by part: 1 - its energy."""
    path = base.path / f"{spec['name']}-{index}-{json.dumps(spec, sort_keys=True).encode().hex()[:60]}"
    made = plan(base, {"layers": {index: {**spec, "method": "svd"}, "default": "attention"}}, "t", 0)
    source = {name: tensor.double() for name, tensor in base.layer(index).items()}
    tensors = {name: tensor.double() for name, tensor in Job(made, base).compute(index, {}).items()}
    assert not path.exists()
    k, v = (source[f"self_attn.{part}_proj.weight"] for part in "kv")
    if spec["name"] == "low_rank_kv":
        groups = tensors["k_up.weight"].shape[0]
        down = tensors["k_down.weight"].unflatten(0, (groups, -1))
        return {"k_proj": float((k - (tensors["k_up.weight"] @ down).flatten(0, 1)).square().sum() / k.square().sum())}
    # Values of the latent, head by head; plain rows of the keys are those that the rotary key does not read.
    rank = tensors["kv_b_proj.weight"].shape[1]
    up = tensors["kv_b_proj.weight"].view(8, 16, rank)[::2]
    latent = tensors["kv_a_proj_with_mqa.weight"][:rank]
    plain = up[:, :8].abs().sum(-1) > 0
    found = torch.cat([(up[:, :8] @ latent)[plain], (up[:, 8:] @ latent).flatten(0, 1)])
    rows = torch.cat([k.view(4, 8, -1)[plain], v])
    return {"kv": float((rows - found).square().sum() / rows.square().sum())}


@pytest.mark.parametrize(
    "spec",
    [{"name": "low_rank_kv"}, {"name": "low_rank_kv", "group_heads": 2}, {"name": "mla", "rope_dim": 4}, {"name": "mla"}],
    ids=str,
)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_energy_says_what_the_seed_by_svd_keeps(spec, share, bases):
    """The rank it gives leaves less than the rest of the energy, and one less would leave more."""
    base = bases["mistral"]
    rows = SCORES.build({"name": "energy"})(base, None, [spec], lambda *a: None)
    name = "kv_rank" if spec["name"] == "mla" else "rank"
    extra = {} if spec["name"] == "mla" else {"v_share": 0.5}
    part = "kv" if spec["name"] == "mla" else "k_proj"
    for row in rows[::2]:
        rank = row.values[part][SHARES.index(share)]
        assert cut(base, row.layer, {**spec, **extra, name: rank})[part] <= 1 - share + 1e-6
        assert cut(base, row.layer, {**spec, **extra, name: rank - 1})[part] > 1 - share
        # Singular values that were not squared would ask for more.
        squared = torch.linspace(3, 0.1, 20, dtype=torch.float64)
        assert ranks_reaching(squared.square()) != ranks_reaching(squared)


def test_energy_of_normed_keys_is_of_what_is_truncated(bases):
    """Qwen3's key rows count at the size their norm gives them; the seed truncates by the same."""
    base = bases["qwen3"]
    conversion, options = CONVERSIONS.build({"name": "mla", "method": "svd"}), MIXERS.build({"name": "mla", "rope_dim": 4})
    source = {n.removeprefix("self_attn."): t for n, t in base.layer(0).items() if n.startswith("self_attn.")}
    found = conversion.spectra(source, build_mixer(options, base.config, 0), base.config)["kv"]
    k, v = (source[f"{part}_proj.weight"].double() for part in "kv")
    heads = k.view(4, 8, -1)
    scaled = heads / heads.square().sum((1, 2), keepdim=True).div(8).sqrt() * source["k_norm.weight"].double()[:, None]
    keep = [1, 3, 5, 7]
    right, wrong = (torch.linalg.svdvals(torch.cat([rows[:, keep].flatten(0, 1), v])).square() for rows in (scaled, heads))
    assert_close(found[: len(right)], right, "fp32")
    assert rms_ratio(found[: len(wrong)], wrong) > 0.01


def test_curves_reach_their_shares():
    spectrum = torch.tensor([5.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    ranks = dict(zip(SHARES, ranks_reaching(spectrum), strict=True))
    assert [ranks[s] for s in (0.005, 0.5, 0.505, 0.8, 0.805, 0.9, 0.999)] == [1, 1, 2, 2, 3, 3, 4]
    assert ranks_reaching(torch.zeros(3, dtype=torch.float64)) == [1] * len(SHARES)
    assert least_rank(list(ranks.values()), 0.801, 1, 4) == 3
    assert least_rank(list(ranks.values()), 0.8, 4, 4) == 4
    assert least_rank(list(ranks.values()), 0.5, 3, 4) == 3


@pytest.mark.parametrize("name", SCORES.names())
def test_a_metric_is_a_frozen_dataclass_of_documented_options(name):
    built = SCORES.build({"name": name})
    assert SCORES.build(SCORES.spec(name, built)) == built
    assert isinstance(built.needs_text, bool)
    assert inspect.getdoc(type(built).__call__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.anything = 1


def test_candidates_are_the_recipes_mixers(bases):
    base = bases["llama"]
    section = {
        "layers": {
            0: "attention",
            1: {"name": "mla", "rope_dim": 4, "kv_rank": {"energy": 0.9}, "method": "svd"},
            "default": {"name": "mla", "rope_dim": 4, "method": "svd"},
        }
    }
    assert candidates_of(section, 3) == [{"name": "mla", "rope_dim": 4, "method": "svd"}]
    found = score(base, [{"name": "energy"}], None, section)
    assert [row.candidate for row in found.tables[0].rows] == [{"name": "mla", "rope_dim": 4}] * 3
    assert found.tables[0].text is None
    plan(base, section, "t", 0, found)
    with pytest.raises(ConfigError, match="mixer 'mamba2' truncates nothing. It is for low_rank_kv, mla"):
        score(base, [{"name": "energy"}], None, {"keep": {"layers": []}, "mixer": "mamba2"})


def test_what_score_refuses(bases, text):
    base = bases["llama"]
    for metrics, words in [
        ([], "got no metric, expected at least one of energy, fisher"),
        ([{"name": "energi"}], "unknown metric 'energi'. Did you mean 'energy'"),
        ([{"name": "energy"}, {"name": "energy"}], "metric energy is asked for twice"),
        ([{"name": "fisher"}], "metric fisher is measured on text. Give --data TEXT"),
        ([{"name": "fisher", "samples": 0}], "samples is 0, expected 1 or more"),
        ([{"name": "fisher", "tokens": 1}], "tokens is 1, expected 2 or more"),
    ]:
        with pytest.raises(ConfigError, match=words):
            score(base, metrics, None)


def test_json_and_back(scores, text, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores.to_dict()))
    assert Scores.read(path) == scores
    assert scores.table("fisher").text == text.sha256
    assert scores.table("fisher").metric == {"name": "fisher", "samples": 256, "tokens": 24}
    # Other metrics have a row for each layer and candidate too, with numbers and their errors.
    row = LayerScore(layer=0, candidate={"name": "gdn"}, values={"kl": 0.1}, stderr={"kl": 0.01})
    other = Scores(base="", base_hash="", tables=(ScoreTable(metric={"name": "swap_kl"}, text="", rows=(row,)),))
    assert Scores.from_dict(json.loads(json.dumps(other.to_dict()))) == other


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("", [], "got no tables"),
        ("tables", {}, "got no tables"),
        ("version", 2, "version is 2, expected 1"),
        ("version", True, "version is True"),
        ("base_hash", None, "base_hash is None, expected text"),
        ("extra", 1, "got unknown ['extra']"),
        ("tables.0", [], "tables.0 is [], expected a mapping with rows"),
        ("tables.0.rows", 3, "expected a mapping with rows"),
        ("tables.0.metric", "energy", "metric is 'energy', expected a mapping with a name"),
        ("tables.0.text", 3, "text is 3, expected a hash or null"),
        ("tables.0.more", 3, "got unknown ['more']"),
        ("tables.1.metric.name", "energy", "metric 'energy' is there twice"),
        ("tables.0.rows.0", 3, "tables.0: rows.0: got unknown 3"),
        ("tables.0.rows.0.layer", -1, "layer is -1, expected an integer >= 0"),
        ("tables.0.rows.0.layer", "0", "layer is '0'"),
        ("tables.0.rows.0.candidate", "mla", "candidate is 'mla', expected null or a mapping"),
        ("tables.0.rows.0.values", {}, "values is {}, expected numbers by part"),
        ("tables.1.rows.0.values.k_proj", "1", "values.k_proj is '1', expected a finite number"),
        ("tables.1.rows.0.values.k_proj", float("nan"), "values.k_proj is nan"),
        ("tables.1.rows.0.values.k_proj", [], "values.k_proj is []"),
        ("tables.1.rows.0.values.k_proj", [1, None], "values.k_proj is [1, None]"),
        ("tables.1.rows.0.stderr", {"q": 1}, "stderr is {'q': 1}, expected numbers by part"),
        ("tables.1.rows.0.stderr", {"k_proj": "x"}, "stderr is {'k_proj': 'x'}"),
        ("tables.1.rows.1.layer", 0, "are there twice, expected one row of each"),
    ],
)
def test_documents_that_are_refused(scores, path, value, words):
    data = json.loads(json.dumps(scores.to_dict()))
    place = data
    keys = [int(key) if key.isdigit() else key for key in path.split(".")] if path else []
    for key in keys[:-1]:
        place = place[key]
    if keys:
        place[keys[-1]] = value
    else:
        data = value
    with pytest.raises(CheckpointError) as caught:
        Scores.from_dict(data, "s.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("s.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad", [0.5, [1] * 5, [99] * len(SHARES), [0.5] * len(SHARES)], ids=["number", "short", "large", "parts"]
)
def test_energy_that_was_edited_is_refused(bases, scores, bad):
    data = copy.deepcopy(scores.to_dict())
    data["tables"][0]["rows"][0]["values"]["k_proj"] = bad
    section = {"keep": {"layers": []}, "mixer": {"name": "low_rank_kv", "rank": {"energy": 0.5}}}
    with pytest.raises(ConfigError, match="scores of metric energy: expected 203 ranks from 1 to 32. Score again"):
        plan(bases["llama"], section, "t", 0, Scores.from_dict(data))


def test_an_ordinary_value_is_no_request():
    assert request_of(3, "rank", ("energy",)) is None
    assert request_of({"name": "mamba2"}, "recurrent", ("energy",)) is None
