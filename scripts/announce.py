"""Wait until the server of `make serve` is ready, then print how to talk to it."""

import os
import sys
import time
import urllib.error
import urllib.request

_URL = "http://127.0.0.1:8000"
_HINT = f"""
Ready. In another terminal:

  curl {_URL}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "sarathi-tiny", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'

  .venv/bin/python -c 'from openai import OpenAI; print(OpenAI(base_url="{_URL}/v1", api_key="none").chat.completions.create(model="sarathi-tiny", messages=[{{"role": "user", "content": "Tell me a story about a fox and a lantern."}}]).choices[0].message.content)'

Ctrl-C stops it.
"""  # noqa: E501  # a line to copy must be one line


def is_ready() -> bool:
    """Ask the server."""
    try:
        with urllib.request.urlopen(f"{_URL}/health/ready", timeout=30) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    """Poll for as long as the process that started this one lives."""
    parent = os.getppid()
    while not is_ready():
        if os.getppid() != parent:
            return
        time.sleep(0.5)
    sys.stdout.write(_HINT)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
