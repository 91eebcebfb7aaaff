"""What runs once: choosing what each layer becomes, and making its weights from the base's.

A conversion is a frozen dataclass of options with

    drops: frozenset[str]     tensors of the source layer that are meant to disappear
    calibrated: bool          whether it needs the calibration pass over text
    __call__(source, mixer, config, generator, calibration) -> tensors of the mixer

and perhaps

    check(mixer options, config)                   asked while planning
    ahead(source, mixer, config, inputs, seen, angles) -> anything
                              asked by the calibration pass of each layer that reads this one, before this one is made

over the tensors of one layer's attention, names without `model.layers.<i>.self_attn.`.
"""

from hybridize.conversions.convert import convert
from hybridize.conversions.plan import plan
from hybridize.conversions.table import CONVERSIONS

__all__ = ["CONVERSIONS", "convert", "plan"]
