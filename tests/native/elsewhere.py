"""Load a checkpoint in a process that cannot import hybridize, with the Auto classes alone; the file is both ends of it.

One interpreter refuses hybridize before it imports anything, and each checkpoint is loaded in a fork of it.

What comes back is what another's machine would compute: logits, greedy text with and without a cache, beams, and a prompt
padded on the left beside a longer one.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

# New tokens of all but greedy text.
FEW = 32


def load_elsewhere(path: Path, ids: torch.Tensor, **asked: Any) -> dict[str, Any]:
    """What AutoModelForCausalLM computes of a checkpoint where hybridize cannot be imported.

    Args:
        path: the directory.
        ids: prompts, [B, T], int64.
        **asked: `dtype` ("float32"), `attn` ("eager"), `new_tokens` (16, of greedy decoding; 0 leaves generation out),
            `beams` (3; 0 leaves them out), `cut` (0: how many tokens the first prompt lacks on its left in the padded batch),
            `trust_remote_code` (False), `logits` (True).

    Returns:
        {"class", "module", "logits" [B, T, V] fp32, "greedy" [B, T + N], "no_cache", "beams", "padded" [B, T + N]: rows of
        tokens}, those that were asked for.

    Raises:
        RuntimeError: the process failed; the message is its traceback.
    """
    request = json.dumps({"path": str(path), "ids": ids.tolist(), **asked})
    print(request, file=server().stdin, flush=True)
    found = json.loads(server().stdout.readline())
    if "error" in found:
        raise RuntimeError(found["error"])
    return {key: torch.tensor(value) if isinstance(value, list) else value for key, value in found.items()}


@functools.cache
def server() -> Any:
    """The interpreter without hybridize, started where it is first asked."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def close() -> None:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)

    atexit.register(close)
    return process


class Refuse:
    """Of a meta path: no hybridize here, wherever it may be installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hybridize":
            raise ModuleNotFoundError("No module named 'hybridize'", name="hybridize")


def answers(model: Any, ids: torch.Tensor, new_tokens: int = 16, beams: int = 3, cut: int = 0) -> dict[str, list[Any]]:
    """What `load_elsewhere` returns of generation, of a model in this process."""
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
    # A random model ends a text whenever it likes; all rows are to be equally long.
    told |= {"min_new_tokens": new_tokens, "pad_token_id": 0}
    found = {"greedy": model.generate(ids, **told)}
    # The long text is the greedy one; a cache, a beam or a mask that errs does so soon.
    told |= {"max_new_tokens": min(new_tokens, FEW), "min_new_tokens": min(new_tokens, FEW)}
    found["no_cache"] = model.generate(ids, **told, use_cache=False)
    if beams:
        found["beams"] = model.generate(ids, **told, num_beams=beams)
    if cut:
        ids, mask = ids.clone(), told["attention_mask"]
        ids[0, :cut], mask[0, :cut] = 0, 0
        found["padded"] = model.generate(ids, **told)
        found["unpadded"] = model.generate(ids[:1, cut:], **{**told, "attention_mask": mask[:1, cut:]})
    return {key: value.tolist() for key, value in found.items()}


def main() -> None:
    """One line of JSON for each line of it; a fork that died without a word is an error too."""
    sys.meta_path.insert(0, Refuse)
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                found = loaded(AutoModelForCausalLM, json.loads(line))
            except BaseException:
                found = {"error": traceback.format_exc()}
            print(json.dumps(found), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"error": f"wait status {status}"}), flush=True)


def loaded(auto: Any, asked: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    ids = torch.tensor(asked["ids"])
    model, told = auto.from_pretrained(
        asked["path"], dtype=getattr(torch, asked.get("dtype", "float32")), attn_implementation=asked.get("attn", "eager"),
        trust_remote_code=asked.get("trust_remote_code", False), output_loading_info=True,
    )  # fmt: skip
    assert not any(told.values()), told
    model.eval()
    found: dict[str, Any] = {"class": type(model).__name__, "module": type(model).__module__}
    with torch.no_grad():
        if asked.get("logits", True):
            found["logits"] = model(ids, use_cache=False).logits.float().tolist()
        if asked.get("new_tokens", 16):
            found |= answers(model, ids, **{key: asked[key] for key in ("new_tokens", "beams", "cut") if key in asked})
    assert "hybridize" not in sys.modules
    return found


if __name__ == "__main__":
    main()
