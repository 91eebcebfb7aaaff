"""What is measured on a base layer by layer before anything is planned.

One file each: a frozen options dataclass with

needs_text: bool                                          whether it is measured on text
__call__(base, text, candidates, progress) -> rows        a LayerScore for each layer, or each layer and candidate
shown(row) -> {column: text}                              a row as it is printed
"""

from hybridize.registry import Registry

SCORES = Registry(
    "metric",
    {
        "energy": "hybridize.conversions.scores.energy:Energy",
        "fisher": "hybridize.conversions.scores.fisher:Fisher",
    },
)
