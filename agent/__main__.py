"""The command ``weir``: one error handler. Exit status 1: expected, 2: usage, 3: a bug in weir, 130: interrupted."""

from __future__ import annotations

import sys
import traceback

from agent import __version__
from agent.cli import weir
from agent.errors import WeirError


def main() -> None:
    """Run the command line."""
    try:
        status = weir.main(standalone_mode=False)
    except WeirError as e:
        print(f"weir: {e}", file=sys.stderr)
        sys.exit(getattr(e, "status", 1))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)  # as a program that SIGPIPE ends
    except Exception as e:  # noqa: BLE001 - the last resort: whatever it is, it is shown as a bug, with status 3
        sys.exit(_other(e))
    sys.exit(status or 0)


def _other(error: Exception) -> int:
    import click

    if isinstance(error, click.Abort):
        return 130
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    traceback.print_exc()
    print(f"weir {__version__}: this is a bug in weir; the lines above say where.", file=sys.stderr)
    return 3


if __name__ == "__main__":
    main()
