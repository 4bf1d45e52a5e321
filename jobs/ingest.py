"""Images -> corpus.

    ray job submit --working-dir . -- python jobs/ingest.py …

takes the arguments of `hashray ingest`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["ingest", *sys.argv[1:]])
