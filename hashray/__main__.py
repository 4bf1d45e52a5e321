"""The `hashray` command and `python -m hashray`: Ctrl-C is answered from the first import on."""

from __future__ import annotations


def run() -> None:
    """Run the command line as this process."""
    try:
        from hashray.cli import entry  # a second of imports
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    entry()


if __name__ == "__main__":
    run()
