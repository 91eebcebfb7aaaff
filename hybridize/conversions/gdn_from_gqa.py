"""Attention weights -> Gated DeltaNet or Kimi delta attention: q, k, v from the base's own, out_proj from o_proj.

`copy` is the published kind of start (Fast-LLM's DIL and KIL, apriel2/conversion/converters.py): projections taken over,
convolutions that pass the token itself, beta 1/2, a slow decay. Two things differ: heads are paired as the base pairs them
(query head h reads key and value head h // (n_q / n_kv)), and the gate starts open, SiLU(z) = 1; with their z = 0 the layer
says nothing and its gate gets no gradient but through z. `calibrated` is ours, solved on text: gdn_search.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.gdn_search import search
from hybridize.conversions.gdn_seed import carried, named
from hybridize.conversions.layer import LayerCalibration
from hybridize.errors import ConfigError
from hybridize.mixers.gdn import DeltaMixer, GDNMixer


@dataclass(frozen=True, kw_only=True)
class GDNFromGQA:
    """How a Gated DeltaNet or a Kimi delta attention layer is seeded."""

    method: Literal["calibrated", "copy"] = "calibrated"
    """`calibrated` is solved on text. `copy`: the projections taken over, a slow decay (Fast-LLM)."""

    drops = frozenset()

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: DeltaMixer,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32.

        Raises:
            ConfigError: the mixer has no biases and the base or the method needs them, or a calibrated seed got no text.
        """
        seed = carried(source, mixer, config)
        if self.method == "calibrated":
            if calibration is None:
                raise ConfigError("method 'calibrated' needs text to calibrate on. Give text, or method copy")
            return search(seed, mixer, config, calibration, generator)
        if not mixer.options.proj_bias and isinstance(mixer, GDNMixer):
            raise ConfigError("method 'copy' opens the gate with a bias; proj_bias must be true, or the method 'calibrated'")
        return named(seed, mixer, generator)
