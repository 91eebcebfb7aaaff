"""llama.cpp computes what the export does: its own converter, its own loader, logits of every position.

Runs where llama-cpp-python is installed and LLAMA_CPP_CONVERTER names llama.cpp's convert_hf_to_gguf.py; the converter runs
under LLAMA_CPP_PYTHON where that is set (it wants sentencepiece), else under this interpreter.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from hybridize.native.export import export
from tests.tolerances import rms_ratio

pytestmark = [pytest.mark.slow, pytest.mark.data]
CONVERTER = os.environ.get("LLAMA_CPP_CONVERTER")
PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
# Another program's fp32 kernels, sums in another order; measured 1e-6 to 4e-6.
LIMIT = 2e-5

SAY = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, out, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokens = len(rows[0])
# fp32 keys and values: its fp16 cache is 1e-3 off whatever the model.
sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), tokens)
model = Llama(path, **sizes, logits_all=True, n_threads=1, type_k=0, type_v=0, verbose=False)
found = []
for row in rows:
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(row)
    found.append(np.array(model.scores[:tokens]))
np.save(out, np.stack(found))
model.close()
"""


def ran(*command):
    done = subprocess.run([PYTHON, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    if CONVERTER is None:
        pytest.skip("LLAMA_CPP_CONVERTER does not name llama.cpp's convert_hf_to_gguf.py")
    for needed in ("llama_cpp", "sentencepiece"):
        if subprocess.run([PYTHON, "-c", f"import {needed}"], capture_output=True, check=False).returncode:
            pytest.skip(f"{PYTHON} has no {needed}; install it, or set LLAMA_CPP_PYTHON")


@pytest.fixture(scope="module")
def rows(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    text = (shared_data / "text" / "tinystories" / "v1_valid_a.txt").read_text()[:4000]
    return torch.tensor(tokenizer(text)["input_ids"][:600]).view(2, 300)


MIXERS = {
    "llama": {"name": "attention"},
    # The window is shorter than the text, so that llama.cpp's has to be the same token for token.
    "granite_swa": {"name": "streaming", "sink_tokens": 0, "window_tokens": 64},
    "bamba": {"name": "mamba2", "method": "mamba_in_llama", "proj_bias": False},
}


@pytest.mark.parametrize("name", MIXERS)
def test_llama_cpp_computes_the_same(name, rows, shared_data, tmp_path):
    base = open_base(shared_data / "models" / "stories260K")
    made = plan(base, {"keep": {"every": 2}, "mixer": MIXERS[name]}, "t", 0)
    assert made.native["engines"]["llama.cpp"]["target"] == name
    convert(made, tmp_path / "hybrid", rows)
    out, gguf = tmp_path / "out", tmp_path / "model.gguf"
    export(tmp_path / "hybrid", name, out)
    found = logits(out, gguf, rows)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(rows).logits
    assert rms_ratio(found, want) < LIMIT
    assert torch.equal(found.argmax(-1), want.argmax(-1))
    if name == "granite_swa":
        # The same weights without the window are far off: what was compared does depend on it.
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "sliding_window": 300}))
        assert rms_ratio(logits(out, gguf, rows), want) > 1e-2


def logits(out, gguf, rows):
    ran(CONVERTER, out, "--outtype", "f32", "--outfile", gguf)
    ran("-c", SAY, gguf, gguf.with_suffix(".npy"), json.dumps(rows.tolist()))
    return torch.from_numpy(np.load(gguf.with_suffix(".npy")))
