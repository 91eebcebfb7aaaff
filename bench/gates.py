r"""False alarms and misses of `recovery` and `max_rise`, by simulation.

recovery: an item is right for the base with probability `accuracy`. The student answers as the base does with probability
`agreement`, else it draws anew with the same accuracy, so that `agreement` is the correlation of the two scores; of the answers
that are then right it loses a share, each alike, so that what it has above chance falls by `drop`. For each number of items the
smallest drop is given that a limit can be set at (min = 1 - drop): a student that lost nothing fails at most 5 % of the time,
and how often one that lost exactly that much is caught stands beside it.

max_rise: the same for a mean of paired differences with standard deviation 1, of several shapes.

    python bench/gates.py
    python bench/gates.py --trials 1000 --items 100 500
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402

from hybridize.eval.gates.paired import FEWEST_ITEMS, mean_bounds, ratio_bounds  # noqa: E402

CONFIDENCE = 0.95
# The limit is set where so many of some trials fail, and what is printed is measured on others.
AIM = 0.04
# (accuracy of the base, chance, agreement): four choices, a task without guessing, and both where the two agree more.
MODELS = [(0.6, 0.25, 0.8), (0.6, 0.25, 0.95), (0.4, 0.0, 0.8), (0.9, 0.0, 0.8), (0.9, 0.0, 0.95)]
Draw = Callable[[np.random.Generator, int], np.ndarray]
# Mean 0, standard deviation 1: as most losses are, skewed, and 5 % of the items lose twenty times what the others vary by.
RARE = math.sqrt(1 + 400 * 0.05 * 0.95)
SHAPES: dict[str, Draw] = {
    "normal": lambda generator, count: generator.normal(size=count),
    "exponential": lambda generator, count: generator.exponential(size=count) - 1,
    "rare": lambda generator, count: (generator.normal(size=count) + 20 * (generator.random(count) < 0.05) - 1) / RARE,
}


def answers(
    generator: np.random.Generator, count: int, accuracy: float, chance: float, agreement: float, drop: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a student and of its base on `count` items, 1 or 0 each, [items]."""
    base = generator.random(count) < accuracy
    student = np.where(generator.random(count) < agreement, base, generator.random(count) < accuracy)
    kept = (chance + (1 - drop) * (accuracy - chance)) / accuracy
    return (student & (generator.random(count) < kept)).astype(float), base.astype(float)


def recovered(
    generator: np.random.Generator,
    trials: int,
    count: int,
    model: tuple[float, float, float],
    drop: float,
    confidence: float = CONFIDENCE,
) -> np.ndarray:
    """Lower bounds of what was recovered, [trials]; -inf where the base was not above chance."""
    accuracy, chance, agreement = model
    bounds = []
    for _ in range(trials):
        ours, theirs = answers(generator, count, accuracy, chance, agreement, drop)
        found = ratio_bounds(ours - chance, theirs - chance, chance, confidence)
        bounds.append(-math.inf if found is None else found[0])
    return np.array(bounds)


def smallest_drop(
    generator: np.random.Generator, trials: int, count: int, model: tuple[float, float, float]
) -> tuple[float, float, float]:
    """(drop in whole per cents, false alarms, detections) of a limit at 1 - drop."""
    nothing_lost = recovered(generator, trials, count, model, 0.0)
    drop = math.ceil(100 * (1 - np.quantile(nothing_lost, AIM, method="inverted_cdf"))) / 100
    if not drop < 1:
        return drop, math.nan, math.nan
    return drop, *(float((recovered(generator, trials, count, model, lost) < 1 - drop).mean()) for lost in (0.0, drop))


def smallest_rise(generator: np.random.Generator, trials: int, count: int, draw: Draw) -> tuple[float, float, float]:
    """(rise in standard deviations of the differences, false alarms, detections) of a limit at that rise."""

    def highs(mean: float) -> np.ndarray:
        return np.array([mean_bounds(mean + draw(generator, count), CONFIDENCE)[1] for _ in range(trials)])

    rise = math.ceil(1000 * np.quantile(highs(0.0), 1 - AIM, method="higher")) / 1000
    return rise, float((highs(0.0) > rise).mean()), float((highs(rise) > rise).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 500, 2000])
    words = parser.parse_args()
    generator = np.random.default_rng(0)
    heads = ["items", "accuracy", "chance", "agreement", "smallest drop", "min", "false alarms", "caught"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for count in words.items:
        for model in MODELS:
            drop, alarms, caught = smallest_drop(generator, words.trials, count, model)
            cells = [
                str(count),
                *(f"{value:g}" for value in model),
                f"{drop:.0%}",
                f"{1 - drop:.2f}",
                f"{alarms:.1%}",
                f"{caught:.1%}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| items | differences | smallest rise, in their standard deviation | false alarms | caught |\n|---|---|---|---|---|")
    for count in [FEWEST_ITEMS, *words.items]:
        for name, draw in SHAPES.items():
            rise, alarms, caught = smallest_rise(generator, words.trials, count, draw)
            print(f"| {count} | {name} | {rise:.3f} | {alarms:.1%} | {caught:.1%} |", flush=True)


if __name__ == "__main__":
    main()
