"""How to start each engine with a checkpoint, and how to reach it. `setup.sh` installs those that are not ours."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT))

from tests.actors.cluster import free_port, serve_run  # noqa: E402  where it is is set above

PEERS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayserve_sarathi" / "peers"
MODELS = PEERS / "models"
_START_S = 240.0
_CONVERT_GGUF = """
import sys
sys.path[:0] = [{source!r}, {source!r} + "/gguf-py"]
import conversion.base, convert_hf_to_gguf
# Its table of known tokenizers lacks ours, which splits like GPT-2's; prompts are token ids anyway.
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert", {model!r}, "--outtype", "f32", "--outfile", {out!r}]
convert_hf_to_gguf.main()
"""


class NotInstalledError(Exception):
    """The engine cannot run here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server that answers.

    Args:
        url: Where.
        model: What it calls the model.
        takes_text: Whether prompts must be text, and only fields of OpenAI's are known.
        has_keep_alive: See `CompletionClient`.
    """

    url: str
    model: str
    takes_text: bool = False
    has_keep_alive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpEngine:
    """An engine behind OpenAI's API.

    Args:
        name: As in the table.
        serve: Starts it for a size of model and yields where it is; the second argument says whether for W3.
        has_own_way: Whether it is started otherwise for W3.
    """

    name: str
    serve: "Callable[[str, bool], Iterator[Endpoint]]"
    has_own_way: bool


@contextmanager
def serving(engine: HttpEngine, model: str, *, is_interfered: bool) -> Iterator[Endpoint]:
    """Start an engine, and stop it.

    Raises:
        NotInstalledError: It is not installed, or does not start.
    """
    yield from engine.serve(model, is_interfered)


def our_settings(model: str, *, is_interfered: bool) -> dict[str, object]:
    """Return this engine's settings for a size of model, as in a deployment file."""
    settings: dict[str, object] = {
        "model": str(MODELS / model),
        "device": "cpu",
        "transport": "inline",
        "kv_cache_memory_bytes": 2 * 2**30,
        "enable_prefix_caching": False,  # as in vLLM: prompts are random, so it would find nothing
        "scheduler": {"max_num_seqs": 64},
    }
    if is_interfered:
        # About what a step of eight decodes and a tile of a prompt takes on two cores.
        settings["slo"] = {"tbt_s": {"15m": 0.025, "125m": 0.2}[model]}
        settings["scheduler"] = {"max_num_seqs": 64, "token_budget": "auto", "max_num_batched_tokens": 2048}
    return settings


def _ours(model: str, is_interfered: bool) -> Iterator[Endpoint]:
    with tempfile.TemporaryDirectory(prefix="rs-peers-") as folder:
        try:
            with serve_run(Path(folder), our_settings(model, is_interfered=is_interfered)) as server:
                yield Endpoint(url=server.url, model=str(MODELS / model))
        except AssertionError as error:
            raise NotInstalledError(str(error)[-2000:]) from error


def _vllm(model: str, is_interfered: bool) -> Iterator[Endpoint]:
    command = [
        *(_program("vllm", "bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(MODELS / model), "--served-model-name", model, "--dtype", "float32"),
        *("--max-model-len", "4096", "--max-num-seqs", "64", "--no-enable-prefix-caching", "--host", "127.0.0.1"),
        *(("--max-num-batched-tokens", "256") if is_interfered else ()),
    ]
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
    }
    yield from _process("vllm", command, environment, model)


def _llama(model: str, is_interfered: bool) -> Iterator[Endpoint]:
    server = _program("llama", "build/bin/llama-server")
    file = MODELS / f"{model}.gguf"
    if not file.exists():
        source = str(PEERS / "llama" / "source" / "vendor" / "llama.cpp")
        script = _CONVERT_GGUF.format(source=source, model=str(MODELS / model), out=str(file))
        subprocess.run([_program("llama", "bin/python"), "-c", script], check=True, capture_output=True)
    # A context for each slot, of a cache of its own; 64 clients share 16 slots, as 64 contexts took longer.
    num_slots = 16
    command = [
        *(server, "-m", str(file), "--alias", model, "--host", "127.0.0.1", "--no-kv-unified"),
        # Its attention is float32 with both alone: else logarithms of probabilities are off by 3e-4 and more, not 1e-6.
        *("-ctk", "f32", "-ctv", "f32", "-fa", "off"),
        *("-t", str(len(os.sched_getaffinity(0))), "-np", str(num_slots), "-c", str(4096 * num_slots)),
        # A connection takes a thread for as long as it is open.
        *("--threads-http", "100"),
        *(("-b", "256") if is_interfered else ()),
    ]
    yield from _process("llama", command, {}, model, has_keep_alive=False)


def _transformers(model: str, is_interfered: bool) -> Iterator[Endpoint]:
    folder = str(MODELS / model)
    command = [
        *(_program("transformers", "bin/transformers"), "serve", folder, "--continuous-batching"),
        *("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"),
    ]
    yield from _process("transformers", command, {}, folder, takes_text=True)


def _process(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    model: str,
    *,
    takes_text: bool = False,
    has_keep_alive: bool = True,
) -> Iterator[Endpoint]:
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline_s = time.monotonic() + _START_S
            while not _answers(f"http://127.0.0.1:{port}/v1/models"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    text = log.read().decode(errors="replace")[-1500:]
                    ended = f"does not answer within {_START_S:.0f} s" if process.returncode is None else "has ended"
                    raise NotInstalledError(f"{name} {ended}: {text}")
                time.sleep(0.2)
            yield Endpoint(
                url=f"http://127.0.0.1:{port}", model=model, takes_text=takes_text, has_keep_alive=has_keep_alive
            )
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself, and nothing of it is left
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False
    except OSError:
        return False


def _program(name: str, path: str) -> str:
    program = PEERS / name / path
    if not program.exists():
        raise NotInstalledError(f"{name} is not installed; run benchmarks/peers/setup.sh {name}")
    return str(program)


def openvino_command(model: str) -> list[str]:
    """Return what drives OpenVINO in a process of its own, its model exported.

    Raises:
        NotInstalledError: It is not installed.
    """
    python = _program("openvino", "bin/python")
    folder = MODELS / f"{model}-openvino"
    if not (folder / "openvino_model.xml").exists():
        export = [
            *(_program("openvino", "bin/optimum-cli"), "export", "openvino", "--model", str(MODELS / model)),
            *("--task", "text-generation-with-past", "--weight-format", "fp32", str(folder)),
        ]
        subprocess.run(export, check=True, capture_output=True)
    return [python, str(Path(__file__).with_name("drive_openvino.py")), str(folder)]


ENGINES = (
    HttpEngine(name="ours", serve=_ours, has_own_way=True),
    HttpEngine(name="vllm", serve=_vllm, has_own_way=True),
    HttpEngine(name="llama.cpp", serve=_llama, has_own_way=True),
    HttpEngine(name="transformers", serve=_transformers, has_own_way=False),
)
