"""Classes of transformers that compute what a plan describes: which fits, who serves it, and how a hybrid becomes one."""

from typing import Any

from hybridize.errors import ConfigError
from hybridize.native.target import ENGINES, Specs, Target
from hybridize.registry import Registry
from hybridize.vllm_plugin.verdict import obstacle as plugin_obstacle

# In the order in which `auto` prefers them.
TARGETS = Registry(
    "native class",
    {
        "llama": "hybridize.native.windowed:OwnLlama",
        "mistral": "hybridize.native.windowed:OwnMistral",
        "qwen2": "hybridize.native.windowed:OwnQwen2",
        "qwen3": "hybridize.native.windowed:OwnQwen3",
        "ministral": "hybridize.native.windowed:Ministral",
        "granite_swa": "hybridize.native.granite_swa:GraniteSWA",
        "granitemoehybrid": "hybridize.native.granite:GraniteMoeHybrid",
        "bamba": "hybridize.native.bamba:Bamba",
        "qwen3_5_text": "hybridize.native.qwen3_5:Qwen35",
        "deepseek_v3": "hybridize.native.deepseek:DeepseekV3",
    },
)

# Mixers that no class of transformers has beside the base's attention, and why.
NO_CLASS = {
    "gmu": "no class of transformers has gated memory units",
    "nha": "no class of transformers runs one softmax over slots and a window",
    "parallel": "the native class with both branches in a layer (falcon_h1) has full attention, not a window",
    "block_sparse": "no native class keeps strided blocks beside a window",
    "streaming_heads": "no native class gives the heads of one layer different windows",
    "gla": "no native class has gated linear attention beside a softmax window",
    "lolcats": "no native class has a softmax window and feature maps under one normaliser",
    "low_rank_kv": "no class of transformers keeps low-rank keys from before the rotary embedding",
    "xkv": "no class of transformers shares one layer's latents of keys and values with others",
    "kda": "the native classes with Kimi delta attention have latent attention beside it, not the base's",
}


def target(name: str) -> Target:
    """The native class of a name. Raises ConfigError for an unknown one."""
    return TARGETS.load(name)()


def fitting(config: Any, mixers: Specs) -> list[str]:
    """The native classes that compute these mixers over a base's or a hybrid's config, the preferred one first."""
    return [name for name in TARGETS.entries if target(name).obstacle(config, mixers) is None]


def obstacle(config: Any, mixers: Specs) -> str:
    """Why no native class fits, in one sentence: of the class that these mixers come nearest to."""
    names = {spec["name"] for spec in mixers}
    for name, reason in NO_CLASS.items():
        if name in names:
            return reason
    nearest = [made for name in TARGETS.entries if names <= {"attention", *(made := target(name)).mixers} and made.mixers & names]
    if not nearest:
        return f"no class of transformers mixes {', '.join(sorted(names))}"
    # Of several, the one whose family is the base's says the most.
    reasons = [made.obstacle(config, mixers) for made in nearest]
    return next(reason for reason in [*(r for r in reasons if r and "is a class for" not in r), *reasons] if reason)


def native_verdict(config: Any, mixers: Specs, only: str | None = None) -> dict[str, Any]:
    """Which native class a plan has, and what each engine would do with it; said before anything is converted.

    Args:
        config: of the base, or a hybrid's.
        mixers: {"name": ..., **every option} of each layer.
        only: a native class that fits, to hear of that one alone.

    Returns:
        {"target": model_type of the native class or "none", "reason": one sentence,
        "engines": {engine: {"target": what to export to, "itself" where the hybrid runs as it is, or "none",
        "reason": how it is run, or why not}}}.
    """
    fits = fitting(config, mixers) if only is None else [only]
    if not fits:
        reason = f"{obstacle(config, mixers)}; the hybrid loads through this package"
        return {"target": "none", "reason": reason, "engines": {e: _itself(e, config, mixers) for e in ENGINES}}
    return {
        "target": fits[0], "reason": target(fits[0]).about, "engines": {e: _engine(e, fits, config, mixers) for e in ENGINES},
    }  # fmt: skip


def _itself(engine: str, config: Any, mixers: Specs) -> dict[str, str]:
    """What an engine makes of a hybrid that has no native class."""
    if engine == "transformers":
        return {"target": "itself", "reason": "after `import hybridize`, or with the code beside it (trust_remote_code=True)"}
    if engine == "vLLM":
        if (reason := plugin_obstacle(config, mixers)) is None:
            return {"target": "itself", "reason": "with the plugin of hybridize[vllm]"}
        return {"target": "none", "reason": reason}
    return {"target": "none", "reason": obstacle(config, mixers)}


def _engine(engine: str, fits: list[str], config: Any, mixers: Specs) -> dict[str, str]:
    said = [(name, *target(name).engine(engine, config, mixers)) for name in fits]
    for name, runs, how in said:
        if runs:
            return {"target": name, "reason": how}
    # A class that the engine has says more than one that it lacks.
    has = [how for name, _, how in said if engine in target(name).served]
    if engine == "vLLM" and plugin_obstacle(config, mixers) is None:
        return _itself(engine, config, mixers)
    return {"target": "none", "reason": [*has, said[0][2]][0]}


def choose(name: str, config: Any, mixers: Specs) -> str:
    """The native class to export to: the one named, or with "auto" the first that fits.

    Raises:
        ConfigError: it does not fit, or none does; the message says why, and which would.
    """
    fits = fitting(config, mixers)
    if name == "auto":
        if not fits:
            raise ConfigError(f"no native class holds this hybrid: {obstacle(config, mixers)}. It loads through its own code")
        return fits[0]
    if reason := target(name).obstacle(config, mixers):
        others = f"these fit: {', '.join(fits)}" if fits else "no other fits either"
        raise ConfigError(f"{name} does not hold this hybrid: {reason}; {others}")
    return name
