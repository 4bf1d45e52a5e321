"""Images -> corpus.

    ray job submit --working-dir . -- python jobs/ingest.py …

takes the arguments of `hashray ingest`, and is that command.
"""

import sys

from hashray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
