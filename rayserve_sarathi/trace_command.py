"""`sarathi trace`: fetch the last steps of a server that runs, as a file for https://ui.perfetto.dev."""

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

_TIMEOUT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--key", required=True, help="one of its ingress.admin_keys")
    parser.add_argument("--output", type=Path, default=Path("trace.json"), help="file to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Write the trace; return the exit status."""
    try:
        body = fetch(arguments.url, arguments.key)
        num_events = len(json.loads(body)["traceEvents"])
        arguments.output.write_bytes(body)
    except urllib.error.HTTPError as error:
        with error:
            problem = _explain(error)
    except (http.client.HTTPException, KeyError, OSError, ValueError) as error:
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


def _explain(error: urllib.error.HTTPError) -> str:
    if error.code == 401:
        return f"{error.url} does not take this key (401); use one of the server's ingress.admin_keys"
    if error.code == 404:
        return f"{error.url} is not there (404); the server has it only if ingress.admin_keys is set"
    return f"{error.url} answers {error.code} {error.reason}"
