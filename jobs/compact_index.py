"""Join small shards of an index and leave out deleted rows.

    ray job submit --working-dir . -- python jobs/compact_index.py …

This runs `hashray index compact` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["index", "compact", *sys.argv[1:]])
