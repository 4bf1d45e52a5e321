"""Model and corpus -> packed codes.

    ray job submit --working-dir . -- python jobs/encode.py …

takes the arguments of `hashray encode`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["encode", *sys.argv[1:]])
