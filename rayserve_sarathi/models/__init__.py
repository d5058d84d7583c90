"""Decoder models: Hugging Face checkpoints by the name of their architecture."""

MODELS = {
    "FalconForCausalLM": "rayserve_sarathi.models.falcon:parse_falcon",
    "LlamaForCausalLM": "rayserve_sarathi.models.llama:parse_llama",
    "MistralForCausalLM": "rayserve_sarathi.models.mistral:parse_mistral",
    "MixtralForCausalLM": "rayserve_sarathi.models.mixtral:parse_mixtral",
    "Qwen2ForCausalLM": "rayserve_sarathi.models.qwen:parse_qwen2",
    "Qwen3ForCausalLM": "rayserve_sarathi.models.qwen:parse_qwen3",
    "YiForCausalLM": "rayserve_sarathi.models.yi:parse_yi",
}
