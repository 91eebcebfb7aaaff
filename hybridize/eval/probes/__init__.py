"""What is measured on a checkpoint. One file each: a frozen options dataclass, called with an EvalContext."""

from hybridize.registry import Registry

PROBES = Registry(
    "probe",
    {
        "perplexity": "hybridize.eval.probes.perplexity:Perplexity",
        "kl_to_base": "hybridize.eval.probes.kl_to_base:KlToBase",
        "recall": "hybridize.eval.probes.recall:Recall",
        "needle": "hybridize.eval.probes.needle:Needle",
        "passkey": "hybridize.eval.probes.passkey:Passkey",
        "copying": "hybridize.eval.probes.copying:Copying",
        "induction": "hybridize.eval.probes.induction:Induction",
        "procedure": "hybridize.eval.probes.procedure:Procedure",
        "shared_context": "hybridize.eval.probes.shared_context:SharedContext",
        "greedy_agreement": "hybridize.eval.probes.greedy_agreement:GreedyAgreement",
        "nll_by_position": "hybridize.eval.probes.nll_by_position:NllByPosition",
        "lm_eval": "hybridize.eval.probes.lm_eval:LmEval",
        "state_bytes": "hybridize.eval.probes.state_bytes:StateBytes",
        "speed": "hybridize.eval.probes.speed:Speed",
    },
)
