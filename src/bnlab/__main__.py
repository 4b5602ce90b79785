"""The `bnlab` command, and `python -m bnlab`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Ctrl-C while the command is imported ends it in one line, as later."""
    try:
        from bnlab.cli.main import main as command
    except KeyboardInterrupt:
        print("bnlab: interrupted", file=sys.stderr)  # noqa: T201 - the command line is not there yet
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
