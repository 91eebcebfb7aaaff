"""What every native class's test asks: does the export say and write what the hybrid does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model
from hybridize.native.export import export
from hybridize.native.granite import no_groups
from tests.native.elsewhere import answers, load_elsewhere
from tests.tolerances import assert_close

needs_groups = pytest.mark.skipif(no_groups() is not None, reason=str(no_groups()))


def assert_same(path, to, out, architecture, new_tokens=24, vocab=64, elsewhere=False, pads=True, **asked):
    """Export, load with plain transformers, and compare logits, greedy text, beams and a prompt padded on the left.

    With `elsewhere` the export is loaded in a process that cannot import hybridize. Without `pads` the class is known to let
    padding in, and the export has to say so.
    """
    summary = export(path, to, out)
    assert summary.target == to or to == "auto"
    ids = torch.randint(3, vocab, (2, 24), generator=torch.Generator().manual_seed(5))
    hybrid, told = load_model(path, torch.float32), {"new_tokens": new_tokens, "beams": 3, "cut": 7}
    want = said(hybrid, ids, told)
    if elsewhere:
        found = load_elsewhere(out, ids, **told, **asked)
        assert (found["class"], found["module"].split(".")[0]) == (architecture, "transformers")
    else:
        native = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        assert (type(native).__name__, type(native).__module__.split(".")[0]) == (architecture, "transformers")
        found = said(native, ids, told)
    assert_close(found["logits"], want["logits"], "fp32")
    for key in want.keys() - {"logits"} - (set() if pads else {"padded"}):
        assert torch.equal(found[key], want[key]), key
    assert torch.equal(found["greedy"][:, : found["no_cache"].shape[1]], found["no_cache"])
    assert summary.proof[-1].exact == pads
    if pads:
        assert torch.equal(found["padded"][:1, 7:], found["unpadded"])
    return summary


@torch.no_grad()
def said(model, ids, told):
    """Logits and generated rows of a model in this process."""
    written = {key: torch.tensor(rows) for key, rows in answers(model, ids, **told).items()}
    return {"logits": model(ids, use_cache=False).logits, **written}


def difference(path, out, to="auto"):
    """Root mean square of the difference of logits over their own, of an export that was kept in spite of it."""
    proofs = export(path, to, out, allow_approximate=True).proof
    assert not proofs[0].exact
    return max(proof.difference_rms / proof.logit_rms for proof in proofs)
