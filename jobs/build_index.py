"""Build a sharded FAISS index from codes and publish it as a version.

    ray job submit --working-dir . -- python jobs/build_index.py …

This runs `hashray index build` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["index", "build", *sys.argv[1:]])
