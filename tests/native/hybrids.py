"""Tiny hybrids with noise in every tensor, so that none that is dropped, swapped or scaled wrongly is missed."""

import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import open_base
from hybridize.conversions import plan
from hybridize.modeling import FP32_PARAMETERS, build_model, hybrid_config
from tests.native.elsewhere import answers, load_elsewhere, told
from tests.tiny import tiny_base
from tests.tolerances import assert_close


def random_hybrid(
    family, tmp, section, dtype=torch.float32, norms=(0.5, 1.5), q_norms=(0.5, 1.5), k_norms=(0.5, 1.5), **overrides
):
    """Save a random hybrid and return its folder.

    Args:
        family: of the base.
        tmp: where.
        section: which layers, as a recipe has it.
        dtype: it is stored in.
        norms: range of the norms' weights.
        q_norms: that of the q-norms.
        k_norms: that of the k-norms.
        **overrides: fields of the base's config.
    """
    made = plan(open_base(tiny_base(family, tmp, **overrides)), section, "test", 0)
    config = hybrid_config(open_base(tmp / f"{family}-base").config, [layer.mixer for layer in made.layers])
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    generator, ranges = torch.Generator().manual_seed(3), {"q_norm": q_norms, "k_norm": k_norms}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.dim() == 1:
                low, high = ranges.get(name.split(".")[-2], norms)
                noise = low + (high - low) * torch.rand(parameter.shape, generator=generator)
            elif parameter.dim() == 1:
                noise = 0.3 * noise
            elif "conv1d" in name:
                # Mostly the token itself: a longer chain of large noise is fp32 rounding before it is anything else.
                noise = 0.3 * noise + torch.eye(parameter.shape[-1])[-1]
            else:
                noise = noise * parameter.shape[-1] ** -0.5 * (0.25 if ".self_attn." in name else 1)
            parameter.data = noise.to(torch.float32 if name.rpartition(".")[2] in FP32_PARAMETERS else dtype)
    path = tmp / "hybrid"
    model.save_pretrained(path)
    return path


def answers_alike(hybrid, native):
    """Fail unless a hybrid and its export, each given as a folder, say the same: 60 tokens, and fewer in every way there is."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    models = _loaded(hybrid), _loaded(native)
    long, again = (model.generate(ids, **told(ids, 60)).tolist() for model in models)
    assert long == again
    want, found = (answers(model, ids, new_tokens=16, beams=3, cut=4) for model in models)
    assert found == want
    assert found["greedy"] == found["no_cache"]
    assert found["padded"][0][4:] == found["unpadded"][0]
    assert found["padded"][1] == found["greedy"][1]


def alike_elsewhere(hybrid, native, ids, named, **asked):
    """As `answers_alike`, and logits, of an export loaded where hybridize cannot be imported; `named` is the class it must be."""
    found = load_elsewhere(native, ids, **asked)
    assert found["class"] == named
    assert found["module"].startswith("transformers.")
    model = _loaded(hybrid)
    with torch.no_grad():
        assert_close(found["logits"], model(ids).logits, "fp32")
    for name, want in answers(model, ids, **asked).items():
        assert found[name].tolist() == want, name


def _loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
