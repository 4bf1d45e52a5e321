"""Train LCGH, reimplemented from the abstract of Zhuang and Moulin (IEEE TIFS 2023), on Ray Train.

    ray job submit --working-dir . -- python jobs/train_lcgh.py jobs/configs/lcgh_cifar100_split.toml --corpus … --out …

This runs `hashray train` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
