"""Encode a corpus with a model to packed codes.

    ray job submit --working-dir . -- python jobs/encode.py …

This runs `hashray encode` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["encode", *sys.argv[1:]])
