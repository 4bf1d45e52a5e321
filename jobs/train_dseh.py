"""Train DSEH (Li et al., IJCAI 2018) on Ray Train.

    ray job submit --working-dir . -- python jobs/train_dseh.py jobs/configs/dseh_cifar10.toml --corpus … --out …

This runs `hashray train` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
