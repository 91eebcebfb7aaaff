"""With vLLM installed: registration, refusals before weights, bytes of states, angles, and tokens served.

vLLM warns on import, so run these as `pytest -W default -m "slow or not slow" tests/vllm_plugin`.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridize.families import FAMILIES
from hybridize.modeling import HYBRIDS, mixer_options
from hybridize.vllm_plugin.verdict import ROPES
from tests.tolerances import TOLERANCES, assert_close
from tests.vllm_plugin.toys import config_of

ROOT = Path(__file__).parents[2]
DECLARED = re.search(r'entry-points\."vllm\.general_plugins"\]\nhybridize = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
BIG = {"hidden_size": 128, "head_dim": 64}
WINDOW = {"name": "streaming", "sink_tokens": 0, "window_tokens": 20}


def test_the_entry_point_is_a_function():
    assert callable(importlib.metadata.EntryPoint("hybridize", DECLARED, "vllm.general_plugins").load())


@pytest.fixture(scope="module")
def vllm():
    """vLLM, told of the hybrids as it tells itself."""
    module = pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hybridize[vllm]'")
    importlib.metadata.EntryPoint("hybridize", DECLARED, "vllm.general_plugins").load()()
    return module


def engine(folder, config, **options):
    """vLLM's configuration for a config.json without weights."""
    from vllm.engine.arg_utils import EngineArgs

    config.save_pretrained(folder)
    return EngineArgs(str(folder), skip_tokenizer_init=True, max_model_len=128, **options).create_engine_config()


def test_registered(vllm):
    from vllm.model_executor.models.registry import ModelRegistry

    for _, _, causal_class in HYBRIDS.values():
        assert causal_class.__name__ in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize(
    ("mixers", "reason"),
    [
        (["attention", "streaming"], "sink_tokens is 4"),
        (["attention", "lolcats"], "layer 1 is lolcats"),
    ],
    ids=str,
)
def test_refused_before_weights(vllm, tmp_path, mixers, reason):
    with pytest.raises(ValueError, match=reason):
        engine(tmp_path, config_of("llama", mixers))


@pytest.mark.parametrize("heads", ["expanded", "grouped"])
def test_bytes_of_states_are_the_hybrids(vllm, tmp_path, heads):
    """As the hybrid's own cache declares them; heads that stay grouped are repeated, which widens the convolution alone."""
    from hybridize.vllm_plugin.model import HybridForCausalLM

    mixers = ["attention", {"name": "mamba2", "heads": heads, "conv_tokens": 3}, {"name": "gdn", "heads": heads}]
    made = engine(tmp_path, config_of("llama", mixers), dtype="float32")
    config = made.model_config.hf_config
    assert made.model_config.is_hybrid
    found = sorted(spec.page_size_bytes for spec in HybridForCausalLM.get_mamba_specs_from_config(made))
    declared = [option.state_bytes(config, 100) for option in mixer_options(config)[1:]]
    width, groups = config.head_dim, config.num_attention_heads - config.num_key_value_heads
    taps = (2, 3) if heads == "grouped" else (0, 0)
    assert found == sorted(one + 2 * groups * width * more * 4 for one, more in zip(declared, taps, strict=True))


@pytest.mark.parametrize("kind", ROPES)
def test_angles_are_transformers_own(vllm, kind):
    """The table that kept attention reads in vLLM, against the base's rotary embedding."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    more = {"default": {}, "linear": {"factor": 4.0}}.get(kind, {"factor": 4.0, "original_max_position_embeddings": 32})
    more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = config_of("llama", ["attention"], rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **more}, **BIG)
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(64, max_position=128, rope_parameters=config.rope_parameters, is_neox_style=True, dtype=torch.float32)
    cos, sin = FAMILIES["llama"].rotary(config)(torch.zeros(1), torch.arange(100)[None])
    assert_close(table.cos_sin_cache[:100], torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=-1), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"family": "qwen3", "mixers": ["attention", "mamba2", WINDOW], "dtype": "float32", "head_dim": 32},
        {"family": "qwen2", "mixers": [{"name": "mamba2", "heads": "expanded"}, "mamba2"], "dtype": "float32"},
        {"family": "qwen3", "mixers": [{"name": "mla", "kv_rank": 512, "rope_dim": 64}] * 2, "dtype": "float32",
         "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
        {"family": "llama", "mixers": ["attention", {"name": "gdn", "heads": "grouped"}, "mamba2"], "dtype": "bfloat16", **BIG},
    ],
    ids=lambda case: "-".join([case["family"], *(m if isinstance(m, str) else m["name"] for m in case["mixers"])]),
)  # fmt: skip
def test_tokens_served_are_the_hybrids(vllm, case):
    command = [sys.executable, "-W", "ignore", "-m", "tests.vllm_plugin.serve", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["same"]
    # In bf16, as far from fp32 as the hybrid itself is in bf16.
    assert said["ratio"] <= (TOLERANCES["fp32"][0] if case["dtype"] == "float32" else 1.5 * said["own"])
