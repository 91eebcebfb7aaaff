"""What a model says, in a process that has torch and transformers alone. Run as a script it reads directories with their code.

    python -I elsewhere.py OUT.pt DIR...       writes {DIR: what it says}, after it was saved and read once more, and prints
                                               the version of transformers

Imports nothing of the package or of the tests, since there it is not.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def tokens(model) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens(model)).logits


def says(model) -> dict[str, torch.Tensor]:
    """Logits, logits of a batch padded on the left, greedy tokens with and without a cache, and tokens of three beams."""
    torch.set_num_threads(1)
    ids = tokens(model)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :4], mask[1, :4] = 0, 0
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return {
            "logits": logits(model),
            "padded": model(padded, attention_mask=mask).logits[mask.bool()],
            "greedy": model.generate(padded, attention_mask=mask, **common),
            "no cache": model.generate(padded, attention_mask=mask, use_cache=False, **common),
            "beams": model.generate(padded, attention_mask=mask, num_beams=3, **common),
        }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def read(folder: str) -> dict[str, torch.Tensor]:
    """What the directory's own code makes of it; the same once it was saved elsewhere and read again."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is type(model.config)
    found = says(model)
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        for name in ("modeling_hybridize.py", "config.json"):
            theirs, ours = (
                [line for line in (Path(place) / name).read_text().splitlines() if "transformers_version" not in line]
                for place in (folder, again)
            )
            assert theirs == ours, f"{name} is not as it was"
        reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
        assert torch.equal(logits(reloaded), found["logits"])
        decoder = AutoModel.from_pretrained(again, trust_remote_code=True).eval()
        decoder.save_pretrained(Path(again) / "decoder")
        assert type(AutoModel.from_pretrained(Path(again) / "decoder", trust_remote_code=True)).__name__ == type(decoder).__name__
    return found


if __name__ == "__main__":
    assert importlib.util.find_spec("hybridize") is None
    out, *folders = sys.argv[1:]
    torch.save({folder: read(folder) for folder in folders}, out)
    assert not any(name.split(".")[0] == "hybridize" for name in sys.modules)
    print(transformers.__version__)
