"""Train neighbourhood codes, a small head that learns without labels, on Ray Train.

    ray job submit --working-dir . -- python jobs/train_neighbours.py CONFIG.toml --corpus … --out …

CONFIG.toml is for example jobs/configs/neighbours_cifar100_split.toml.
This runs `hashray train` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
