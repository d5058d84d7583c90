"""What the README shows, run as it stands; the example with a Ray handle is run in tests/actors."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_offline_example_runs(capsys: pytest.CaptureFixture[str]):
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "LLM(" in block]
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 30


def test_the_two_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"serve", "test", "install"} <= set(targets)
    assert all(f"make {name}" in README for name in ("serve", "test"))


def test_every_file_that_a_document_links_to_is_there():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
