"""Find duplicates in an index: pairs, groups around a centre, train-query leaks, pages.

    ray job submit --working-dir . -- python jobs/duplicates.py …

This runs `hashray index duplicates` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["index", "duplicates", *sys.argv[1:]])
