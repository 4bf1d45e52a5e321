"""Turn images into a corpus.

    ray job submit --working-dir . -- python jobs/ingest.py …

This runs `hashray ingest` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["ingest", *sys.argv[1:]])
