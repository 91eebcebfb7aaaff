"""What a report must satisfy. One file each: a frozen options dataclass, called with a report and a baseline.

`rule` of a gate names its options in the order that `--rule "max_ratio perplexity 1.05"` gives them, `compares` says whether
it needs a baseline. A gate that has too few samples to decide says so and fails.
"""

from hybridize.registry import Registry

GATES = Registry(
    "gate",
    {
        "amnesia": "hybridize.eval.gates.amnesia:Amnesia",
        "decode_speed": "hybridize.eval.gates.decode_speed:DecodeSpeed",
        "max_ratio": "hybridize.eval.gates.max_ratio:MaxRatio",
        "max_rise": "hybridize.eval.gates.max_rise:MaxRise",
        "max_value": "hybridize.eval.gates.max_value:MaxValue",
        "min_value": "hybridize.eval.gates.min_value:MinValue",
        "parity": "hybridize.eval.gates.parity:Parity",
        "recovery": "hybridize.eval.gates.recovery:Recovery",
        "same_tokenizer": "hybridize.eval.gates.same_tokenizer:SameTokenizer",
    },
)
