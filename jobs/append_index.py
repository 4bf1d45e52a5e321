"""Add codes to an index as new shards.

    ray job submit --working-dir . -- python jobs/append_index.py …

This runs `hashray index append` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["index", "append", *sys.argv[1:]])
