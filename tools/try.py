"""Sets up octavo and asks SmolLM2-135M-Instruct a question: ``python3 tools/try.py ["your question"]``.

Needs Python 3.11 or newer and nothing else. Further arguments go to ``octavo chat``.
"""

from __future__ import annotations

import sys

import _venv

QUESTION = "What is the capital of France? Answer in one sentence."


def main(argv: list[str]) -> int:
    question, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (QUESTION, argv)
    return _venv.run(
        "", ["-m", "octavo", "chat", "--message", question, "--temperature", "0", "--max-tokens", "200", *options]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
