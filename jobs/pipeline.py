"""Ingest, train, encode, index and evaluate in one run.

    ray job submit --working-dir . -- python jobs/pipeline.py …

This runs `hashray pipeline` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["pipeline", *sys.argv[1:]])
