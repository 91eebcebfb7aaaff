"""What a report must satisfy. One file each: a frozen options dataclass, called with a report and a baseline.

`rule` of a gate names its options in the order that `--rule "max_ratio perplexity 1.05"` gives them.
"""

from hybridize.registry import Registry

GATES = Registry(
    "gate",
    {
        "max_ratio": "hybridize.eval.gates.max_ratio:MaxRatio",
        "max_value": "hybridize.eval.gates.max_value:MaxValue",
        "min_value": "hybridize.eval.gates.min_value:MinValue",
        "recovery": "hybridize.eval.gates.recovery:Recovery",
    },
)
