"""Ask a running server for what only an admin key opens, from a command line."""

import argparse
import os
import urllib.error
import urllib.request

_TIMEOUT_S = 60.0
_KEY_VARIABLE = "SARATHI_ADMIN_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which server, and who asks."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--key",
        help=f"one of its ingress.admin_keys (default: {_KEY_VARIABLE} of the environment, which `ps` does not show)",
    )


def fetch(arguments: argparse.Namespace, path: str) -> bytes:
    """Return what the server answers; raises what `urllib.request.urlopen` does, or ValueError without a key.

    Args:
        arguments: Of the command line.
        path: From the root of the server.
    """
    key = arguments.key or os.environ.get(_KEY_VARIABLE)
    if not key:
        raise ValueError(f"no key; give one of the server's ingress.admin_keys by --key or {_KEY_VARIABLE}")
    request = urllib.request.Request(arguments.url.rstrip("/") + path, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        body: bytes = response.read()
    return body


def explain(error: urllib.error.HTTPError) -> str:
    """Return what a refusal means."""
    if error.code == 401:
        return f"{error.url} does not take this key (401); use one of the server's ingress.admin_keys"
    if error.code == 404:
        return f"{error.url} is not there (404); the server has it only if ingress.admin_keys is set"
    return f"{error.url} answers {error.code} {error.reason}"
