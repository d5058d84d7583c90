"""Policies that decide what a step computes. Pure: a policy sees its queue and the clock it is given."""

SCHEDULERS = {
    "sarathi": "rayserve_sarathi.scheduling.sarathi:SarathiScheduler",
    "vllm": "rayserve_sarathi.scheduling.vllm:VllmScheduler",
    "orca": "rayserve_sarathi.scheduling.orca:OrcaScheduler",
    "faster_transformer": "rayserve_sarathi.scheduling.faster_transformer:FasterTransformerScheduler",
    "chunked_only": "rayserve_sarathi.scheduling.chunked_only:ChunkedOnlyScheduler",
    "hybrid_only": "rayserve_sarathi.scheduling.hybrid_only:HybridOnlyScheduler",
}
