"""What vLLM asks about a hybrid's config before it builds anything: refusals, and the fields it looks for."""

# pyright: reportMissingImports=false

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hybridize.errors import ConfigError
from hybridize.modeling import mixer_options
from hybridize.vllm_plugin.verdict import extra_fields, obstacle


def check(config: Any, tensor_parallel: int = 1) -> None:
    """Raises ConfigError, in one line, for a hybrid that vLLM cannot serve exactly."""
    options = mixer_options(config)
    if reason := obstacle(config, config.mixers, tensor_parallel):
        raise ConfigError(f"vllm: {reason}")
    for name, value in extra_fields(config, options).items():
        setattr(config, name, value)


class HybridArchitecture(ModelArchConfigConvertorBase):
    """The first thing that reads a config: refuses it, or adds vLLM's fields to it (in memory, never to the file)."""

    def __init__(self, hf_config: Any, hf_text_config: Any, revision: str | None = None):
        check(hf_config)
        super().__init__(hf_config, hf_text_config, revision=revision)

    def is_deepseek_mla(self) -> bool:
        """Pages of the cache are sized for latents where there are any; other attention brings sizes of its own."""
        return getattr(self.hf_text_config, "kv_lora_rank", None) is not None


class HybridChecks(VerifyAndUpdateConfig):
    """What follows from how vLLM is started."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what the layers cannot do together; keep states in fp32, as the hybrid's own cache does."""
        check(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)
        if vllm_config.speculative_config is not None:
            raise ConfigError("vllm: speculative decoding is set, which hybrids are not served with. Leave it out")
        if vllm_config.lora_config is not None:
            raise ConfigError("vllm: LoRA is set, which hybrids are not served with. Merge the adapter first")
        if vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
            vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"
