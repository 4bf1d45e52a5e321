"""Search for better settings with Ray Tune and Optuna, over a training config with a [space] table.

    ray job submit --working-dir . -- python jobs/tune.py jobs/sweeps/dseh.toml --corpus … --out …

This runs `hashray tune` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["tune", *sys.argv[1:]])
