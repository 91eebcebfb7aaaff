"""The one modelling file: each family's own model, with `self_attn` swapped where config.mixers says so.

Names of all other tensors stay transformers', so that a plan that keeps every layer is the base, bit for bit. The
model_type is our own: another loader must refuse a hybrid, not read it as its base.
"""

# The mixins name what the library classes they are mixed into have; a type checker sees each alone.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from hybridize.config import HybridConfigMixin, wrong_class
from hybridize.errors import ConfigError
from hybridize.families import NATIVE_TYPES
from hybridize.mixers import MIXERS
from hybridize.mixers.attention import Attention
from hybridize.mixers.memory import Memories, check_reads, read_layers
from hybridize.static_cache import HybridStaticCache

# Kept in fp32 whatever the model's dtype: a decay rounded to bf16 is another half-life.
FP32_PARAMETERS = ["A_log", "dt_bias", "D"]


def mixer_options(config: Any) -> list[Any]:
    """The options object of each layer. Raises ConfigError when `mixers` does not fit the layers, or one does not another."""
    specs = config.mixers
    if not isinstance(specs, list) or len(specs) != config.num_hidden_layers:
        found = len(specs) if isinstance(specs, list) else specs
        raise ConfigError(f"config.json: mixers has {found} entries, expected num_hidden_layers = {config.num_hidden_layers}")
    options = [MIXERS.build(spec) for spec in specs]
    try:
        check_reads([spec["name"] for spec in specs], options, config)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from error
    return options


def state_bytes(config: Any, tokens: int) -> int:
    """Cache bytes of one sequence after `tokens` tokens, over all layers of a base's or a hybrid's config, in its dtype."""
    if config.model_type in NATIVE_TYPES:
        raise ConfigError(f"state bytes of a {config.model_type} are those of the hybrid that it was exported from; ask of that")
    if not config.model_type.startswith("hybrid_"):
        return config.num_hidden_layers * Attention().state_bytes(config, tokens)
    return sum(options.state_bytes(config, tokens) for options in mixer_options(config))


class HybridModelMixin:
    """Over a family's decoder: swaps the mixers in and hands them what a 4-D mask cannot tell."""

    def __init__(self, config: Any):
        if not isinstance(config, self.config_class):
            raise wrong_class(config.model_type, self.config_class.model_type)
        config.check_made_for()
        super().__init__(config)
        self.mixer_options = mixer_options(config)
        for index, options in enumerate(self.mixer_options):
            mixer = options.build(config, index)
            if mixer is not None:
                self.layers[index].self_attn = mixer
        self.forgets = any(options.forgets for options in self.mixer_options)
        self.read_layers = read_layers(self.mixer_options)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own; hands the mixers what they need beside it.

        Where some layer forgets: `padding_mask` [B, T] and `segment_ids` [B, T], of which either may be None. Where some layer
        reads another one's memory: `memories`, a place that lives for this pass.

        Raises:
            ConfigError: a mask that is not [B, tokens], right padding together with a cache, a static cache that is full, or a
                way of checkpointing gradients that would lose those of memories.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        static = isinstance(past_key_values, HybridStaticCache)
        if static and not torch.compiler.is_compiling():
            past_key_values.take(tokens.shape[1], tokens.shape[0])
        if self.read_layers:
            self._check_checkpointing()
            kwargs["memories"] = Memories(self.read_layers)
        if not self.forgets:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = DynamicCache(config=self.config)
        padding_mask = None
        # Behind a cache a single token is never padding; looking would stop a device, and break a graph.
        step = past_key_values is not None and tokens.shape[1] == 1 and (static or torch.compiler.is_compiling())
        if isinstance(attention_mask, Tensor) and not step:
            if attention_mask.dim() != 2:
                raise ConfigError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, tokens] with 0 on padding: "
                    "recurrent and streaming layers cannot follow an arbitrary mask"
                )
            padding_mask = attention_mask[:, -tokens.shape[1] :].bool()
            if bool(padding_mask.all()):
                padding_mask = None
            elif past_key_values is not None and not bool(padding_mask[:, -1].all()):
                raise ConfigError("right padding with a cache would put the padding into the state; pad on the left")
        segment_ids = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            segment_ids = find_packed_sequence_indices(position_ids.expand(tokens.shape[0], -1))
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            padding_mask=padding_mask, segment_ids=segment_ids, **kwargs,
        )  # fmt: skip

    def _check_checkpointing(self) -> None:
        """Reentrant checkpoints run a layer without a graph and replay it from its first argument alone."""
        for layer in self.layers if self.training and torch.is_grad_enabled() else ():
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if layer.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant", True):
                raise ConfigError(
                    "gradient checkpointing has use_reentrant true, expected false: the gradient of memories would be lost. "
                    'Enable it with {"use_reentrant": False}'
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_own_parameters"):
            module.reset_own_parameters(init)


class HybridCausalMixin:
    """Over a family's causal LM: the hybrid decoder in place of its own."""

    _keep_in_fp32_modules_strict = FP32_PARAMETERS

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.decoder_class(config)
        # Recurrent and streaming states cannot be rolled back; this keeps assisted decoding away.
        self._is_stateful = self.model.forgets
        self.post_init()

    def _prepare_static_cache(self, cache_implementation: str, batch_size: int, max_cache_len: int, **unused: Any) -> Any:
        """What `generate(cache_implementation="static")` makes its cache with."""
        if cache_implementation != "static":
            raise ConfigError(
                f"cache_implementation is {cache_implementation!r}, expected 'static' or None: hybrids have no other"
            )
        return HybridStaticCache(self.config, max_cache_len)

    @staticmethod
    def create_masks_for_generate(attention_mask: Any, inputs_embeds: Tensor, **arguments: Any) -> Any:
        """Masks that `generate` makes before it calls a static cache's model: of fixed size for a step, the prompt's as it is."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **arguments)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_own_parameters"):
            module.reset_own_parameters(init)


class HybridLlamaConfig(HybridConfigMixin, LlamaConfig):
    """Llama's config and `mixers`, one {"name": ..., **options} a layer."""

    model_type = "hybrid_llama"
    mixers: list | None = None


class HybridMistralConfig(HybridConfigMixin, MistralConfig):
    """Mistral's config and `mixers`, one {"name": ..., **options} a layer."""

    model_type = "hybrid_mistral"
    mixers: list | None = None


class HybridQwen2Config(HybridConfigMixin, Qwen2Config):
    """Qwen2's config and `mixers`, one {"name": ..., **options} a layer."""

    model_type = "hybrid_qwen2"
    mixers: list | None = None


class HybridQwen3Config(HybridConfigMixin, Qwen3Config):
    """Qwen3's config and `mixers`, one {"name": ..., **options} a layer."""

    model_type = "hybrid_qwen3"
    mixers: list | None = None


class HybridLlamaModel(HybridModelMixin, LlamaModel):
    """Llama's decoder with the mixers in place."""

    config_class = HybridLlamaConfig
    _keep_in_fp32_modules_strict = FP32_PARAMETERS


class HybridMistralModel(HybridModelMixin, MistralModel):
    """Mistral's decoder with the mixers in place."""

    config_class = HybridMistralConfig
    _keep_in_fp32_modules_strict = FP32_PARAMETERS


class HybridQwen2Model(HybridModelMixin, Qwen2Model):
    """Qwen2's decoder with the mixers in place."""

    config_class = HybridQwen2Config
    _keep_in_fp32_modules_strict = FP32_PARAMETERS


class HybridQwen3Model(HybridModelMixin, Qwen3Model):
    """Qwen3's decoder with the mixers in place."""

    config_class = HybridQwen3Config
    _keep_in_fp32_modules_strict = FP32_PARAMETERS


class HybridLlamaForCausalLM(HybridCausalMixin, LlamaForCausalLM):
    """Llama's causal LM over the hybrid decoder."""

    config_class = HybridLlamaConfig
    decoder_class = HybridLlamaModel


class HybridMistralForCausalLM(HybridCausalMixin, MistralForCausalLM):
    """Mistral's causal LM over the hybrid decoder."""

    config_class = HybridMistralConfig
    decoder_class = HybridMistralModel


class HybridQwen2ForCausalLM(HybridCausalMixin, Qwen2ForCausalLM):
    """Qwen2's causal LM over the hybrid decoder."""

    config_class = HybridQwen2Config
    decoder_class = HybridQwen2Model


class HybridQwen3ForCausalLM(HybridCausalMixin, Qwen3ForCausalLM):
    """Qwen3's causal LM over the hybrid decoder."""

    config_class = HybridQwen3Config
    decoder_class = HybridQwen3Model


HYBRIDS = {
    "llama": (HybridLlamaConfig, HybridLlamaModel, HybridLlamaForCausalLM),
    "mistral": (HybridMistralConfig, HybridMistralModel, HybridMistralForCausalLM),
    "qwen2": (HybridQwen2Config, HybridQwen2Model, HybridQwen2ForCausalLM),
    "qwen3": (HybridQwen3Config, HybridQwen3Model, HybridQwen3ForCausalLM),
}


def register() -> None:
    """Make these classes known to transformers' Auto classes, which then prefer them to code that lies beside weights."""
    for config, decoder, causal in HYBRIDS.values():
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, decoder)
        AutoModelForCausalLM.register(config, causal)


def hybrid_config(base_config: Any, mixers: list[dict[str, Any]]) -> Any:
    """The hybrid config of a base config: every field carried over, `mixers` added, class and model_type our own."""
    config_class, _, causal_class = HYBRIDS[base_config.model_type.removeprefix("hybrid_")]
    fields = base_config.to_dict()
    for name in ("model_type", "transformers_version", "auto_map", "_name_or_path", "mixers", "made_for_sha256"):
        fields.pop(name, None)
    fields["architectures"] = [causal_class.__name__]
    return config_class(**fields, mixers=[dict(spec) for spec in mixers])


def build_model(config: Any) -> Any:
    """A freshly initialised hybrid causal LM of a hybrid config, in fp32."""
    return HYBRIDS[config.model_type.removeprefix("hybrid_")][2](config)
