"""What runs once: choosing what each layer becomes, and making its weights from the base's.

A conversion is a frozen dataclass of options with

    drops: frozenset[str]     tensors of the source layer that are meant to disappear
    calibrated: bool          whether it needs the calibration pass over text
    __call__(source, mixer, config, generator, calibration) -> tensors of the mixer

and perhaps

    check(mixer options, config)                   asked while planning
    ahead(source, mixer, config, inputs, seen, angles) -> anything
                              asked by the calibration pass of each layer that reads this one, before this one is made
    spectra(source, mixer, config)                 where its mixer has ranks: squared singular values of what they cut, by part
    spectra_of(options, config)                    the options that these depend on
    from_scores(spec, layers, config, scores)      each layer's spec with ranks from layer scores

over the tensors of one layer's attention, names without `model.layers.<i>.self_attn.`. `score` measures those scores, one
metric a file in scores/.
"""

from hybridize.conversions.convert import convert
from hybridize.conversions.plan import plan
from hybridize.conversions.score import score
from hybridize.conversions.scores import SCORES
from hybridize.conversions.table import CONVERSIONS

__all__ = ["CONVERSIONS", "SCORES", "convert", "plan", "score"]
