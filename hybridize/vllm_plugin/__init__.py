"""Serves hybrids with vLLM: what it can hold (verdict), where tensors go (weights), the layers and the model.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. Written for vLLM
0.33.0; `verdict` and `weights` need torch and this package alone.
"""

# pyright: reportMissingImports=false

from hybridize.modeling import HYBRIDS


def register() -> None:
    """Tell vLLM of the hybrid classes. May be called again; loads no layer and touches no device."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from hybridize.vllm_plugin.configuration import HybridArchitecture, HybridChecks

    for config_class, _, causal_class in HYBRIDS.values():
        ModelRegistry.register_model(causal_class.__name__, "hybridize.vllm_plugin.model:HybridForCausalLM")
        MODELS_CONFIG_MAP[causal_class.__name__] = HybridChecks
        MODEL_ARCH_CONFIG_CONVERTORS[config_class.model_type] = HybridArchitecture
