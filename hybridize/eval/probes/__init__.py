"""What is measured on a checkpoint. One file each: a frozen options dataclass, called with an EvalContext."""

from hybridize.registry import Registry

PROBES = Registry(
    "probe",
    {
        "perplexity": "hybridize.eval.probes.perplexity:Perplexity",
        "kl_to_base": "hybridize.eval.probes.kl_to_base:KlToBase",
        "recall": "hybridize.eval.probes.recall:Recall",
        "needle": "hybridize.eval.probes.needle:Needle",
        "lm_eval": "hybridize.eval.probes.lm_eval:LmEval",
        "state_bytes": "hybridize.eval.probes.state_bytes:StateBytes",
        "speed": "hybridize.eval.probes.speed:Speed",
    },
)
