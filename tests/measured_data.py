"""Where measured profiles and traces are, for the tests that compare with them: none are in this repository.

They are public: the profiles of microsoft/vidur (MIT), traces of microsoft/sarathi-serve (Apache-2.0), and others. Set
`SARATHI_DATA` to a folder with `profiles/` and `traces/`, or put it into a folder beside the repository.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def data_folder() -> Path | None:
    """Return the folder, or None if there is none."""
    if named := os.environ.get("SARATHI_DATA"):
        return Path(named)
    return next((found.parent for found in sorted(ROOT.parent.glob("*/data/profiles"))), None)
