"""Generates the synchronous client, client/tpv/_sync, from the asynchronous one, client/tpv/_async.

    python scripts/unasync.py            writes the files
    python scripts/unasync.py --check    exits 1 when they are stale

Words are replaced, in code and docstrings alike, as httpcore and psycopg do; nothing is parsed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[1] / "client" / "tpv"
SOURCE, TARGET = CLIENT / "_async", CLIENT / "_sync"
HEADER = "# Generated from {source} by scripts/unasync.py; change that file instead.\n# ruff: noqa\n# fmt: off\n"

# In this order; each a regular expression on words.
REPLACEMENTS = [
    (r"The asynchronous client, written by hand; .*?\.\"\"\"", 'The synchronous client."""'),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bimport asyncio\n", ""),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"\b__aenter__\b", "__enter__"),
    (r"\b__aexit__\b", "__exit__"),
    (r"\baclose\b", "close"),
    (r"\baread\b", "read"),
    (r"\baiter_bytes\b", "iter_bytes"),
    (r"\btpv\._async\b", "tpv._sync"),
    (r"\bAsync([A-Z]\w*)\b", r"\1"),
]


def synchronous(text: str, source: str) -> str:
    """The synchronous twin of a module's text."""
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    if "time.sleep" in text and not re.search(r"^import time$", text, re.MULTILINE):
        text = text.replace("from collections.abc", "import time\nfrom collections.abc", 1)
    return HEADER.format(source=source) + text


def main(arguments: list[str]) -> int:
    wanted = {
        TARGET / path.name: synchronous(path.read_text(), f"client/tpv/_async/{path.name}")
        for path in sorted(SOURCE.glob("*.py"))
    }
    left_over = set(TARGET.glob("*.py")) - set(wanted)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in [*stale, *left_over]:
            sys.stderr.write(f"{path.relative_to(CLIENT.parents[1])} is stale; run: python scripts/unasync.py\n")
        return 1 if stale or left_over else 0
    TARGET.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(wanted[path])
    for path in left_over:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
