"""Deployment settings: every field checked, every typo answered."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_sarathi.config import AppConfig, EngineConfig, SchedulerConfig, parse
from rayserve_sarathi.errors import ConfigError

DEPLOYMENTS = Path(__file__).resolve().parents[1] / "deployments"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model: field required"),
        ({"model": ""}, "model is empty"),
        ({"model": "m", "blok_size": 16}, "unknown setting blok_size; did you mean block_size"),
        ({"model": "m", "scheduler": {"token_budgt": 1}}, "did you mean scheduler.token_budget"),
        ({"model": "m", "ingress": {"api_key": []}}, "did you mean ingress.api_keys"),
        ({"model": "m", "zzz": 1}, "unknown setting zzz; use one of"),
        ({"model": "m", "block_size": "16"}, "block_size: input should be a valid integer, got '16'"),
        ({"model": "m", "block_size": True}, "block_size: input should be a valid integer, got True"),
        ({"model": "m", "block_size": 0}, "block_size must be at least 1, got 0"),
        ({"model": "m", "pipeline_parallel_size": 0}, "pipeline_parallel_size must be at least 1"),
        ({"model": "m", "tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"model": "m", "max_model_len": 0}, "max_model_len must be at least 1"),
        ({"model": "m", "num_gpu_blocks_override": -1}, "num_gpu_blocks_override must be at least 1"),
        ({"model": "m", "kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1"),
        ({"model": "m", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be greater than 0"),
        ({"model": "m", "step_timeout_s": 0}, "step_timeout_s must be a number greater than 0"),
        ({"model": "m", "step_timeout_s": float("nan")}, "step_timeout_s must be a number greater than 0"),
        ({"model": "m", "served_model_name": ""}, "served_model_name is empty"),
        ({"model": "m", "num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 9}, "give one"),
        (["model"], "settings must be a mapping"),
        ({"model": "m", "seed": -1}, "seed must be at least 0"),
        (
            {"model": "m", "transport": "inline", "device": "cuda", "tensor_parallel_size": 2},
            "tensor_parallel_size=2 with transport inline runs on CPUs only",
        ),
        (
            {"model": "m", "transport": "pigeon"},
            "transport: input should be 'auto', 'compiled_graph', 'socket' or 'inline'",
        ),
        ({"model": "m", "dtype": "int4"}, "dtype: input should be"),
        ({"model": "m", "device": "tpu"}, "device: input should be"),
        ({"model": "m", "load_format": "pt"}, "load_format: input should be"),
        ({"model": "m", "placement_strategy": "pack"}, "placement_strategy: input should be 'PACK', 'SPREAD',"),
        ({"model": "m", "wait_for_nodes": 1}, "wait_for_nodes: input should be a valid boolean"),
        ({"model": "m", "hf_overrides": ["hidden_size"]}, "hf_overrides: input should be an object"),
        ({"model": "m", "scheduler": 3}, "scheduler: input should be an object"),
        ({"model": "m", "scheduler": {"token_budget": 0}}, "token_budget must be at least 1"),
        ({"model": "m", "scheduler": {"token_budget": "best"}}, "input should be 'auto', got 'best'"),
        (
            {"model": "m", "scheduler": {"policy": "vllm", "token_budget": "auto"}},
            "token_budget auto is for the policy sarathi, and policy is vllm",
        ),
        ({"model": "m", "scheduler": {"max_num_batched_tokens": 0}}, "max_num_batched_tokens must be at least 1"),
        ({"model": "m", "slo": {"tbt": 0.1}}, "unknown setting slo.tbt; did you mean slo.tbt_s"),
        ({"model": "m", "slo": {"tbt_s": 0}}, "tbt_s must be a number greater than 0"),
        ({"model": "m", "slo": {"tbt_s": 0.1, "quantile": 1}}, "quantile must be at least 0.5 and less than 1"),
        ({"model": "m", "scheduler": {"max_num_seqs": 0}}, "max_num_seqs must be at least 1"),
        ({"model": "m", "scheduler": {"max_num_partial_prefills": 0}}, "max_num_partial_prefills must be at least 1"),
        ({"model": "m", "scheduler": {"max_num_waiting": 0}}, "max_num_waiting must be at least 1"),
        ({"model": "m", "scheduler": {"watermark": 1}}, "watermark must be at least 0 and less than 1"),
        ({"model": "m", "ingress": {"api_keys": [""]}}, "empty key"),
        ({"model": "m", "ingress": {"admin_keys": ["a", ""]}}, "admin_keys holds an empty key"),
        ({"model": "m", "ingress": {"api_keys": ["a", "b "]}}, "api_keys holds a key that begins or ends with a space"),
        ({"model": "m", "ingress": {"admin_keys": ["\tb"]}}, "admin_keys holds a key that begins or ends with a space"),
        ({"model": "m", "ingress": {"api_keys": ["a", "b"], "admin_keys": ["b"]}}, "both api_keys and admin_keys"),
        ({"model": "m", "ingress": {"max_body_bytes": 0}}, "max_body_bytes must be at least 1"),
        ({"model": "m", "ingress": {"request_timeout_s": -1}}, "request_timeout_s must be a number greater than 0"),
    ],
)
def test_a_wrong_setting_is_answered_with_what_would_do(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        parse(AppConfig, settings)
    assert message in str(caught.value)


def test_nested_settings_and_lists_arrive():
    config = parse(AppConfig, {"model": "m", "scheduler": {"token_budget": 7}, "ingress": {"api_keys": ["a", "b"]}})

    assert config.scheduler == SchedulerConfig(token_budget=7)
    assert config.ingress.api_keys == ("a", "b")
    assert config.model_name == "m"


@pytest.mark.parametrize("path", sorted(DEPLOYMENTS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_deployment_files_hold_valid_settings(path: Path):
    for application in yaml.safe_load(path.read_text())["applications"]:
        assert isinstance(parse(AppConfig, application["args"]), EngineConfig)


def test_a_budget_of_auto_is_sized_by_its_limit():
    settings = {"model": "m", "scheduler": {"token_budget": "auto", "max_num_batched_tokens": 4096}}
    config = parse(EngineConfig, settings | {"slo": {"tbt_s": 0.1}})

    assert (config.scheduler.max_token_budget, config.scheduler.max_step_tokens) == (4096, 4096)
    assert config.slo.tbt_s == 0.1
    assert SchedulerConfig(token_budget=7).max_token_budget == 7
    assert SchedulerConfig(token_budget=7, max_num_seqs=9).max_step_tokens == 9
