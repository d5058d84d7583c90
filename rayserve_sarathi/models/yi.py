"""The first Yi checkpoints, Llama but for the names of two norms; later ones are `LlamaForCausalLM` (01.AI, 2023)."""

from rayserve_sarathi.models.config import DecoderConfig, WeightNames
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.parse import parse_decoder


def parse_yi(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `YiForCausalLM`."""
    return parse_decoder(hf, weight_names=WeightNames(input_norm="ln1", mlp_norm="ln2"))
