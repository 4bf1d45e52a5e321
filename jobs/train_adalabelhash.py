"""Train AdaLabelHash (Yang et al., CVPR Workshops 2019) on Ray Train, with or without self-training.

    ray job submit --working-dir . -- python jobs/train_adalabelhash.py jobs/configs/adalabelhash_cifar10.toml …

This runs `hashray train` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
