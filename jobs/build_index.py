"""Codes -> sharded FAISS index, published as a version.

    ray job submit --working-dir . -- python jobs/build_index.py …

takes the arguments of `hashray index build`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["index", "build", *sys.argv[1:]])
