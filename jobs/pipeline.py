"""Ingest, train, encode, index and evaluate in a row.

    ray job submit --working-dir . -- python jobs/pipeline.py …

takes the arguments of `hashray pipeline`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["pipeline", *sys.argv[1:]])
