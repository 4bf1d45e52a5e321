"""Score a model on a corpus: metrics.json, figures and report.html.

    ray job submit --working-dir . -- python jobs/evaluate.py …

This runs `hashray evaluate` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["evaluate", *sys.argv[1:]])
