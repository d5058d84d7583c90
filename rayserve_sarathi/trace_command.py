"""`sarathi trace`: fetch the last steps of a server that runs, as a file for https://ui.perfetto.dev."""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

_TIMEOUT_S = 60.0
_KEY_VARIABLE = "SARATHI_ADMIN_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--key",
        help=f"one of its ingress.admin_keys (default: {_KEY_VARIABLE} of the environment, which `ps` does not show)",
    )
    parser.add_argument("--output", type=Path, default=Path("trace.json"), help="file to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Write the trace; return the exit status."""
    key = arguments.key or os.environ.get(_KEY_VARIABLE)
    if not key:
        sys.stderr.write(f"error: no key; give one of the server's ingress.admin_keys by --key or {_KEY_VARIABLE}\n")
        return 1
    try:
        body = fetch(arguments.url, key)
        num_events = _count_events(body)
        arguments.output.write_bytes(body)
    except urllib.error.HTTPError as error:
        with error:
            problem = _explain(error)
    except (http.client.HTTPException, OSError, ValueError) as error:
        problem = f"no trace from {arguments.url}: {error}"
    else:
        sys.stdout.write(f"wrote {num_events} events to {arguments.output}; open it at https://ui.perfetto.dev\n")
        return 0
    sys.stderr.write(f"error: {problem}\n")
    return 1


def fetch(url: str, key: str) -> bytes:
    """Return the trace as the server renders it; raises what `urllib.request.urlopen` does.

    Args:
        url: Of the server, without the path.
        key: One of its admin keys.
    """
    request = urllib.request.Request(url.rstrip("/") + "/debug/trace", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        body: bytes = response.read()
    return body


def _count_events(body: bytes) -> int:
    trace = json.loads(body)
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise ValueError("what answers there is JSON, but no trace")
    return len(events)


def _explain(error: urllib.error.HTTPError) -> str:
    if error.code == 401:
        return f"{error.url} does not take this key (401); use one of the server's ingress.admin_keys"
    if error.code == 404:
        return f"{error.url} is not there (404); the server has it only if ingress.admin_keys is set"
    return f"{error.url} answers {error.code} {error.reason}"
