"""`sarathi trace`: fetch the last steps of a server that runs, as a file for https://ui.perfetto.dev."""

import argparse
import http.client
import json
import sys
import urllib.error
from pathlib import Path

from rayserve_sarathi import admin_client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    admin_client.add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("trace.json"), help="file to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Write the trace; return the exit status."""
    try:
        body = admin_client.fetch(arguments, "/debug/trace")
        num_events = _count_events(body)
        arguments.output.write_bytes(body)
    except urllib.error.HTTPError as error:
        with error:
            problem = admin_client.explain(error)
    except (http.client.HTTPException, OSError, ValueError) as error:
        problem = f"no trace from {arguments.url}: {error}"
    else:
        sys.stdout.write(f"wrote {num_events} events to {arguments.output}; open it at https://ui.perfetto.dev\n")
        return 0
    sys.stderr.write(f"error: {problem}\n")
    return 1


def _count_events(body: bytes) -> int:
    trace = json.loads(body)
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise ValueError("what answers there is JSON, but no trace")
    return len(events)
