"""Search for a better config than the defaults: Ray Tune with Optuna over a training config and its [space] table.

    ray job submit --working-dir . -- python jobs/tune.py jobs/sweeps/dseh.toml --corpus … --out …

takes the arguments of `hashray tune`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["tune", *sys.argv[1:]])
