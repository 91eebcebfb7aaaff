"""What is minimised: one file each, computed in fp32, as a mean over the tokens that count."""

from hybridize.registry import Registry

LOSSES = Registry(
    "loss",
    {
        "mixer_output": "hybridize.distill.losses.mixer_output:MixerOutput",
        "hidden_state": "hybridize.distill.losses.hidden_state:HiddenState",
        "kl": "hybridize.distill.losses.kl:KL",
        "cross_entropy": "hybridize.distill.losses.cross_entropy:CrossEntropy",
    },
)
