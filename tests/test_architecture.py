"""The rules that keep the parts apart: imports point down, pure parts are pure, the links are there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rayserve_sarathi"

# Each layer may import those after it, and itself.
LAYERS = [
    {"cli"},
    {"actors"},
    {"doctor", "llm", "doctor_command", "trace_command", "why_command", "profile_command"},
    {"profiling"},
    {"deployment_file"},
    {"openai", "local_engine", "bench"},
    {"engine"},
    {"simulation"},
    {"execution", "scheduling", "text", "routing", "placement_wait"},
    {"models", "kv", "placement"},
    {"config"},
    {"load_report", "tracing"},
    {"metrics", "step_log", "step_shape"},
    {"step", "stage_times"},
    {"admin_client", "links", "request", "registry"},
    {"errors", "kernels"},
]
SIBLINGS_THAT_NEVER_MEET = [
    ("scheduling", "execution"),
    ("openai", "engine"),
    ("openai", "local_engine"),
    ("text", "execution"),
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py" and "tiny" not in path.parts] + [
        path for folder in ("actors", "kernels") for path in (PACKAGE / folder).glob("**/*.py")
    ]


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", sorted(set(modules())), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imports_of(path):
        if not module.startswith("rayserve_sarathi."):
            continue
        other = part_of(module)
        if other in LEVEL:
            assert LEVEL[other] >= LEVEL[part], f"{path.name} ({part}) imports {module}, which is above it"
            assert (part, other) not in SIBLINGS_THAT_NEVER_MEET, f"{part} and {other} know nothing of each other"
            assert (other, part) not in SIBLINGS_THAT_NEVER_MEET, f"{part} and {other} know nothing of each other"


@pytest.mark.parametrize("path", sorted(set(modules())), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_actors_know_ray(path: Path):
    roots = {module.split(".")[0] for module in imports_of(path)}
    assert "ray" not in roots or path.relative_to(PACKAGE).parts[0] == "actors"
    assert not roots & {"actors", "kernels"}, "these have no top-level name of their own"


@pytest.mark.parametrize(
    "module",
    [
        "rayserve_sarathi",
        "rayserve_sarathi.cli",
        "rayserve_sarathi.config",
        "rayserve_sarathi.placement",
        "rayserve_sarathi.step",
        "rayserve_sarathi.metrics",
        "rayserve_sarathi.scheduling.sarathi",
        "rayserve_sarathi.simulation.simulator",
        "rayserve_sarathi.simulation.figures.session",
        "rayserve_sarathi.models.resolve",
        "rayserve_sarathi.engine",
        "rayserve_sarathi.simulation.prediction",
        "rayserve_sarathi.execution.socket_pipeline",
        "rayserve_sarathi.openai.server",
        "rayserve_sarathi.bench.session",
    ],
)
def test_pure_parts_load_neither_torch_nor_ray(module: str):
    assert not {"torch", "ray", "transformers"} & loaded_by(module)


def test_only_who_computes_loads_torch():
    # It takes seconds of a core, at a start in which every process has much to load.
    assert not {"torch", "transformers"} & loaded_by("rayserve_sarathi.actors.app")


def loaded_by(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("folder", ["actors", "kernels"])
def test_the_links_point_to_the_top_level(folder: str):
    link = PACKAGE / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    # A regular package of this name on sys.path would shadow Hugging Face's `kernels`.
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_contracts_load_under_their_public_names():
    import rayserve_sarathi

    assert rayserve_sarathi.LLM.__name__ == "LLM"
    assert rayserve_sarathi.SamplingParams().max_tokens == 16
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rayserve_sarathi.nothing  # noqa: B018  # the access is what is tested
