"""`echelon`, also as `python -m echelon`: what needs no engine is answered before one is loaded."""

import sys

from echelon import __version__


def main() -> int:
    """Run the command that the process was started with; see `echelon.cli.main`."""
    if sys.argv[1:] == ["--version"]:
        print(f"echelon {__version__}")
        return 0
    try:
        from echelon import cli
    except KeyboardInterrupt:  # loading takes a second or two
        print("echelon: stopped", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
