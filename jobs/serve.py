"""Serve an index over HTTP, with a page to search it, until the job is stopped.

    ray job submit --working-dir . -- python jobs/serve.py …

This runs `hashray serve` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["serve", *sys.argv[1:]])
