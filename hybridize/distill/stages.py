"""The stages a run is made of."""

from hybridize.registry import Registry

STAGES = Registry(
    "stage",
    {
        "align": "hybridize.distill.align:Align",
        "kl": "hybridize.distill.kl:KLStage",
        "long": "hybridize.distill.long:Long",
        "gates": "hybridize.distill.gates:Gates",
        "sft": "hybridize.distill.sft:Sft",
        "dpo": "hybridize.distill.dpo:Dpo",
    },
)
