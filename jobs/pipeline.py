"""Ingest, train, encode, index and evaluate in a row.

    ray job submit --working-dir . -- python jobs/pipeline.py …

takes the arguments of `hashray pipeline`, and is that command.
"""

import sys

from hashray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
