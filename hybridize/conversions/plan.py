"""Decide everything: which layer becomes what, at what size and state, and whether a native class can hold it."""

import dataclasses
import logging
from typing import Any

import torch

from hybridize.checkpoint import Described
from hybridize.conversions.ranks import is_request
from hybridize.conversions.table import CONVERSIONS
from hybridize.core import LayerPlan, Plan, Scores
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.lineage import origin
from hybridize.mixers import MIXERS
from hybridize.mixers.memory import check_reads
from hybridize.native import native_verdict
from hybridize.registry import make, suggest

log = logging.getLogger(__name__)

STATE_TOKENS = (1024, 4096, 8192, 32768, 131072)
"""Context lengths at which a plan states its cache bytes."""
# Beyond every window: from here on a cache grows evenly or not at all.
FAR = 1 << 24
KEEP_KEYS = ("every", "layers", "first", "last", "middle")
TABLES = (MIXERS, CONVERSIONS)
NEEDS_SCORES = "needs layer scores that choose between mixers, which are not part of this release; they give ranks so far"


def _integer(value: Any, where: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{where} is {value!r}, expected an integer >= {least}")
    return value


def _in_range(value: Any, where: str, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise ConfigError(f"{where}: layer {value!r} is out of range: the base has {count} layers, 0 to {count - 1}")
    return value


def kept_layers(keep: Any, count: int) -> set[int]:
    """Which of `count` layers a recipe's `keep` leaves as attention.

    `all`; `{every: n}`: the last of each group of n, so layers n-1, 2n-1, ...; `{layers: [...]}`: these;
    `{first: a, last: b}`: the first a and the last b; `{middle: s}`: the share s around the centre, rounded, at least one.

    Raises:
        ConfigError: another form, or a layer that the base does not have.
    """
    where = "plan.keep"
    if keep == "all":
        return set(range(count))
    if not isinstance(keep, dict) or not keep:
        raise ConfigError(f"{where} is {keep!r}, expected `all` or a mapping with {', '.join(KEEP_KEYS)}")
    if set(keep) & {"count", "by"}:
        raise ConfigError(f"{where}: {{count, by}} {NEEDS_SCORES}. Use one of {', '.join(KEEP_KEYS)}")
    if unknown := [key for key in keep if key not in KEEP_KEYS]:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}. {suggest(str(unknown[0]), list(KEEP_KEYS))}")
    if "every" in keep and len(keep) == 1:
        step = _integer(keep["every"], f"{where}.every", 1)
        return {index for index in range(count) if index % step == step - 1}
    if "layers" in keep and len(keep) == 1:
        if not isinstance(keep["layers"], (list, tuple)):
            raise ConfigError(f"{where}.layers is {keep['layers']!r}, expected a list of layer numbers")
        return {_in_range(index, f"{where}.layers", count) for index in keep["layers"]}
    if "middle" in keep and len(keep) == 1:
        share = keep["middle"]
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ConfigError(f"{where}.middle is {share!r}, expected a share of the layers above 0 and up to 1")
        wanted = max(1, int(count * share + 0.5))
        return set(range((count - wanted) // 2, (count - wanted) // 2 + wanted))
    if set(keep) <= {"first", "last"}:
        first = _integer(keep.get("first", 0), f"{where}.first", 0)
        last = _integer(keep.get("last", 0), f"{where}.last", 0)
        if first + last > count:
            raise ConfigError(f"{where}: first + last is {first + last}, out of range: the base has {count} layers")
        return {*range(first), *range(count - last, count)}
    raise ConfigError(f"{where}: got {', '.join(keep)} together, expected one of every, layers, middle, or first and last")


def layer_specs(section: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The {"name": ..., **options} of each of `count` layers, as the recipe gives them; a bare name is a mixer's defaults.

    Raises:
        ConfigError: an unknown key, a form that contradicts itself, or a layer that the base does not have.
    """
    known = ["keep", "mixer", "layers", "parts", "budget"]
    if not isinstance(section, dict):
        raise ConfigError(f"plan is {section!r}, expected a mapping with {', '.join(known)}")
    if unknown := [key for key in section if key not in known]:
        raise ConfigError(f"plan: unknown key {unknown[0]!r}. {suggest(str(unknown[0]), known)}")
    if "budget" in section:
        raise ConfigError(f"plan.budget {NEEDS_SCORES}. Use keep and mixer, layers, or parts")
    for form in ("layers", "parts"):
        if form in section and (others := [key for key in known if key in section and key != form]):
            raise ConfigError(f"plan: got {form} together with {' or '.join(others)}, expected one or the other. Remove one")
    if "parts" in section:
        return _named(_from_parts(section["parts"], count))
    if "layers" in section:
        return _named(_from_layers(section["layers"], count))
    if "keep" not in section:
        raise ConfigError("plan.keep is missing. Say which layers stay attention, such as {every: 4}; {layers: []} is none")
    kept = kept_layers(section["keep"], count)
    if len(kept) < count and "mixer" not in section:
        raise ConfigError("plan.mixer is missing. Say what the layers that are not kept become, such as {name: mamba2}")
    if "mixer" in section:
        # Checked even where no layer takes it: a recipe's mistake shows with `keep: all` too.
        split_options(_unasked(_named([section["mixer"]])[0]), "plan.mixer")
    return _named([{"name": "attention"} if index in kept else section["mixer"] for index in range(count)])


def _named(specs: list[Any]) -> list[Any]:
    return [{"name": spec} if isinstance(spec, str) else spec for spec in specs]


def _from_layers(layers: Any, count: int) -> list[dict[str, Any]]:
    if not isinstance(layers, dict):
        raise ConfigError(f"plan.layers is {layers!r}, expected a mapping of layer number (or default) to a mixer")
    named = {}
    for key, spec in layers.items():
        if key != "default":
            # JSON has no integer keys.
            index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
            named[_in_range(index, "plan.layers", count)] = spec
    if len(named) < count and "default" not in layers:
        absent = next(index for index in range(count) if index not in named)
        raise ConfigError(f"plan.layers: layer {absent} is not named and there is no default. Add default: {{name: attention}}")
    return [named[index] if index in named else layers["default"] for index in range(count)]


def _from_parts(parts: Any, count: int) -> list[dict[str, Any]]:
    """Equal parts of the depth from the bottom up, the lower ones larger by one where it does not divide.

    Each is {cycle: [mixers], last: mixer}: the cycle over and over, and `last`, if given, in place of its last layer.
    """
    known = ["cycle", "last"]
    if not isinstance(parts, (list, tuple)) or not 1 <= len(parts) <= count:
        raise ConfigError(f"plan.parts is {parts!r}, expected a list of 1 to {count} mappings with {' and '.join(known)}")
    specs = []
    for place, part in enumerate(parts):
        where = f"plan.parts.{place}"
        if not isinstance(part, dict) or not isinstance(part.get("cycle"), (list, tuple)) or not part["cycle"]:
            raise ConfigError(f"{where}: got {part!r}, expected a mapping with cycle, a list of mixers, and perhaps last")
        if unknown := [key for key in part if key not in known]:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}. {suggest(str(unknown[0]), known)}")
        # Rounded up, and so one layer for each at least.
        size = -(-(place + 1) * count // len(parts)) - len(specs)
        chosen = [part["cycle"][index % len(part["cycle"])] for index in range(size)]
        specs += [*chosen[:-1], part.get("last", chosen[-1])]
    return specs


def _following(spec: Any) -> Any:
    """How options of a spec's mixer follow layer scores, by its conversion; None where none can."""
    name = spec.get("name") if isinstance(spec, dict) else None
    return getattr(CONVERSIONS.load(name), "from_scores", None) if isinstance(name, str) and name in CONVERSIONS.entries else None


def _unasked(spec: Any) -> Any:
    """A spec without the options that are to follow layer scores."""
    return {key: value for key, value in spec.items() if not is_request(value)} if _following(spec) else spec


def _from_scores(specs: list[Any], config: Any, scores: Scores | None) -> list[Any]:
    """Specs in which nothing is left to follow layer scores. Layers of equal specs share what there is to share."""
    made = list(specs)
    alike: dict[str, list[int]] = {}
    for index, spec in enumerate(specs):
        if _following(spec):
            alike.setdefault(repr(spec), []).append(index)
    for layers in alike.values():
        spec = specs[layers[0]]
        try:
            ranked = _following(spec)(spec, layers, config, scores)
        except ConfigError as error:
            raise ConfigError(f"plan: layer {layers[0]}: mixer {spec['name']!r}: {error}") from error
        for index, one in zip(layers, ranked, strict=True):
            made[index] = one
    return made


def candidates_of(section: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The different mixers of a recipe's `plan`, without what is to follow layer scores; attention aside."""
    specs = [_unasked(spec) for spec in layer_specs(section, count)]
    return [s for i, s in enumerate(specs) if s not in specs[:i] and not (isinstance(s, dict) and s.get("name") == "attention")]


def _settled(spec: Any, below: list[Any], above: list[Any]) -> Any:
    """A layer's spec; where its mixer reads a layer and none is named, with the one that the mixer chooses.

    Args:
        spec: as the recipe gives it, perhaps malformed.
        below: options of the mixers of the layers below.
        above: specs of the layers above.
    """
    name = spec.get("name") if isinstance(spec, dict) else None
    if name not in MIXERS.entries or "reads" in spec or not hasattr(mixer := MIXERS.load(name), "settle"):
        return spec
    try:
        return mixer.settle(spec, below, above)
    except ConfigError as error:
        raise ConfigError(f"plan: layer {len(below)}: mixer {name!r} {error}") from error


def split_options(spec: Any, where: str) -> tuple[Any, Any]:
    """The mixer and the conversion of a recipe's {"name": ..., **options of either}.

    Raises:
        ConfigError: no such mixer, an option that neither has, or a value of the wrong kind.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{where}: got {spec!r}, expected a mapping with a name. Known: {', '.join(MIXERS.names())}")
    name = spec["name"]
    mixer, conversion = MIXERS.load(name), CONVERSIONS.load(name)
    runtime = {field.name for field in dataclasses.fields(mixer)}
    once = {field.name for field in dataclasses.fields(conversion)}
    assert not runtime & once, f"{name}: an option of both mixer and conversion"
    # A mixer inside the mixer is given like any other, and its seed goes to the conversion's option of it.
    inner = getattr(mixer, "nested", {})
    once -= set(inner.values())
    for key in spec:
        if key not in runtime | once | {"name"}:
            options = suggest(str(key), sorted(runtime | once)) if runtime | once else "It has none"
            raise ConfigError(f"{where}: mixer {name!r} has no option {key!r}. {options}")
    label = f"{where}: mixer {name!r}"
    kept = {key: value for key, value in spec.items() if key in runtime}
    seed = {key: value for key, value in spec.items() if key in once}
    for option, seed_option in inner.items():
        branch = kept.get(option, getattr(mixer(), option))
        parts = split_options(branch, f"{where}.{option}")
        kept[option], seed[seed_option] = (table.spec(branch["name"], part) for table, part in zip(TABLES, parts, strict=True))
    return make(mixer, kept, label), make(conversion, seed, label)


def build_mixer(options: Any, config: Any, index: int) -> torch.nn.Module:
    """The module of a layer on the meta device; the base's own attention where the mixer keeps it."""
    with torch.device("meta"):
        module = options.build(config, index)
        return FAMILIES[config.model_type.removeprefix("hybrid_")].attention(config, index) if module is None else module


def plan(base: Described, section: dict[str, Any], recipe_name: str, seed: int, scores: Scores | None = None) -> Plan:
    """Decide what every layer becomes. Reads no weights.

    Args:
        base: the base, or what its config.json says.
        section: the recipe's `plan`: keep and mixer, layers, or parts.
        recipe_name: for the record.
        seed: of whatever a conversion draws at random.
        scores: layer scores of this base, for options that follow them; None where none does.

    Returns:
        Per layer the mixer, the conversion (defaults filled in), parameters and cache bytes; the whole cache against the
        base's; and the native verdict.

    Raises:
        ConfigError: the section cannot be used; the message names the key or the layer.
    """
    if scores is not None and scores.base_hash != base.config_hash:
        raise ConfigError(f"scores: are of another base ({scores.base}), its config.json differs from {base.path}'s. Score again")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed is {seed!r}, expected an integer >= 0")
    config = base.config
    layers, mixers, growth = [], [], 0.0
    kept = MIXERS.build({"name": "attention"})
    asked = layer_specs(section, config.num_hidden_layers)
    specs = _from_scores(asked, config, scores)
    if scores is not None and specs == asked:
        log.warning("%s: nothing in the plan follows the scores given, such as rank: {fisher: 0.5}", recipe_name)
    for index, spec in enumerate(specs):
        mixer, conversion = split_options(_settled(spec, mixers, specs[index + 1 :]), f"plan: layer {index}")
        mixers.append(mixer)
        try:
            module = build_mixer(mixer, config, index)
            if hasattr(conversion, "check"):
                conversion.check(mixer, config)
        except ConfigError as error:
            raise ConfigError(f"plan: layer {index}: mixer {spec['name']!r}: {error}") from error
        growth += (mixer.state_bytes(config, 2 * FAR) - mixer.state_bytes(config, FAR)) / FAR
        layers.append(
            LayerPlan(
                index=index,
                mixer=MIXERS.spec(spec["name"], mixer),
                conversion=CONVERSIONS.spec(spec["name"], conversion),
                parameters=sum(p.numel() for p in module.parameters()),
                state_bytes={str(tokens): mixer.state_bytes(config, tokens) for tokens in STATE_TOKENS},
            )
        )
    try:
        check_reads([layer.mixer["name"] for layer in layers], mixers, config)
    except ConfigError as error:
        raise ConfigError(f"plan: {error}") from error
    return Plan(
        base=str(base.path),
        base_hash=base.config_hash,
        origin=origin(base.path),
        family=base.family,
        recipe=recipe_name,
        seed=seed,
        layers=tuple(layers),
        kv_share=growth / (len(layers) * kept.state_bytes(config, 1)),
        base_state_bytes={str(tokens): len(layers) * kept.state_bytes(config, tokens) for tokens in STATE_TOKENS},
        native=native_verdict(config, [layer.mixer for layer in layers]),
    )
