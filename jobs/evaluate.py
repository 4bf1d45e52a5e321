"""Model and corpus -> metrics.json, figures and report.html.

    ray job submit --working-dir . -- python jobs/evaluate.py …

takes the arguments of `hashray evaluate`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["evaluate", *sys.argv[1:]])
