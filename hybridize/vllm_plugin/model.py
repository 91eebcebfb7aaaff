"""A hybrid as vLLM's model: its Llama decoder with each layer's own mixer."""

# pyright: reportMissingImports=false

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index, is_pp_missing_parameter
from vllm.v1.kv_cache_interface import MambaSpec

from hybridize.errors import CheckpointError
from hybridize.families import head_dim
from hybridize.mixers.gdn import GDN
from hybridize.mixers.mamba2 import Mamba2
from hybridize.modeling import mixer_options
from hybridize.vllm_plugin import layers, weights


class HybridDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the plan's mixer in it."""

    def __init__(self, vllm_config: Any, prefix: str = ""):
        option = mixer_options(vllm_config.model_config.hf_config)[extract_layer_index(prefix)]

        def mixer(prefix: str, **unused: Any) -> torch.nn.Module:
            return layers.build(vllm_config, option, prefix)

        super().__init__(vllm_config, prefix, attn_layer_type=mixer)


class HybridForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid):
    """One class for all families: what differs between them is in the layers."""

    supports_lora = False
    supports_eagle = False
    supports_eagle3 = False

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=partial(HybridDecoderLayer))
        self.options = mixer_options(self.config)

    @classmethod
    def get_mamba_specs_from_config(cls, vllm_config: Any) -> tuple[Any, ...]:
        """What each kind of recurrent layer keeps of a sequence on one GPU: (convolution, state), in bytes of a page."""
        config, dtypes = vllm_config.model_config.hf_config, cls.get_mamba_state_dtype_from_config(vllm_config)
        heads, width = config.num_attention_heads, head_dim(config)
        gpus, drafts = vllm_config.parallel_config.tensor_parallel_size, vllm_config.num_speculative_tokens
        shapes = set()
        for option in mixer_options(config):
            if isinstance(option, Mamba2):
                shapes.add(
                    MambaStateShapeCalculator.mamba2_state_shape(
                        gpus, heads * width, heads, heads, width, width, option.conv_tokens, drafts
                    )
                )
            elif isinstance(option, GDN):
                shapes.add(
                    MambaStateShapeCalculator.gated_delta_net_state_shape(
                        gpus, heads, heads, width, width, option.conv_tokens, drafts
                    )
                )
        return tuple(MambaSpec(shapes=shape, dtypes=dtypes, block_size=-1) for shape in sorted(shapes))

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """The larger state, where there are several kinds."""
        specs = cls.get_mamba_specs_from_config(vllm_config)
        return max(specs, key=lambda spec: spec.page_size_bytes).shapes if specs else ()

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """The model's dtype for the convolution; fp32 for the state unless vLLM is told another."""
        cache = vllm_config.cache_config
        return MambaStateDtypeCalculator.mamba2_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a convolution and a state are copied; alike for both kinds."""
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    def load_weights(self, weights_: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load every tensor of the checkpoint, each into its place.

        Args:
            weights_: (name, tensor) of the checkpoint.

        Returns:
            names of all parameters of this rank.

        Raises:
            CheckpointError: a tensor that no parameter takes, or a parameter that got none.
        """
        targets = dict(self.named_parameters())
        for name, module in self.named_modules():
            if isinstance(module, layers.LatentLayer) and module.chosen:
                targets[f"{name}.rope_pairs"] = module.rope_pairs
        loaded: set[str] = set()
        for name, tensor in weights_:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            for part in weights.parts(self.config, self.options, name, tensor):
                if is_pp_missing_parameter(part.name, self):
                    continue
                if part.name not in targets:
                    raise CheckpointError(f"{name}: vLLM's model has no {part.name}. Convert the checkpoint again")
                target = targets[part.name]
                load = getattr(target, "weight_loader", default_weight_loader)
                load(target, part.tensor) if part.shard is None else load(target, part.tensor, part.shard)
                loaded.add(part.name)
        for name, module in self.named_modules():
            for zero in getattr(module, "zeros", ()):
                torch.nn.init.zeros_(targets[f"{name}.{zero}"])
                loaded.add(f"{name}.{zero}")
        if missing := sorted(set(targets) - loaded):
            raise CheckpointError(f"the checkpoint has nothing for {missing[0]} and {len(missing) - 1} more. Convert it again")
        return loaded
