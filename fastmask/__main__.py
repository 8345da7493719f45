"""The command ``fastmask``, also run by ``python -m fastmask``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command."""
    try:
        from fastmask.cli.main import main as run
    except ImportError as error:
        sys.exit(f"fastmask: {error}")
    run()


if __name__ == "__main__":
    main()
