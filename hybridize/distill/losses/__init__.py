"""What is minimised: one file each, computed in fp32, as a mean over the tokens that count."""

from typing import Any

from hybridize.registry import Registry

LOSSES = Registry(
    "loss",
    {
        "mixer_output": "hybridize.distill.losses.mixer_output:MixerOutput",
        "hidden_state": "hybridize.distill.losses.hidden_state:HiddenState",
        "mixing_matrix": "hybridize.distill.losses.mixing_matrix:MixingMatrix",
        "relations": "hybridize.distill.losses.relations:Relations",
        "features": "hybridize.distill.losses.features:Features",
        "kl": "hybridize.distill.losses.kl:KL",
        "jsd": "hybridize.distill.losses.jsd:JSD",
        "top_k_kl": "hybridize.distill.losses.top_k_kl:TopKKL",
        "sampled_kl": "hybridize.distill.losses.sampled_kl:SampledKL",
        "gate_sparsity": "hybridize.distill.losses.gate_sparsity:GateSparsity",
        "cross_entropy": "hybridize.distill.losses.cross_entropy:CrossEntropy",
    },
)


def asks_of_teacher(loss: Any) -> tuple[frozenset[str], ...]:
    """Sets of the teacher's signals, any one of which is enough for a loss; an empty set is a loss without a teacher."""
    return getattr(loss, "of_teacher", (loss.needs,))
