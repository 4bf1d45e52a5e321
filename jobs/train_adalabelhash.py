"""Train AdaLabelHash (Yang et al., CVPR Workshops 2019), self-training included, on Ray Train.

    ray job submit --working-dir . -- python jobs/train_adalabelhash.py jobs/configs/adalabelhash_cifar10.toml …

takes the arguments of `hashray train`, and is that command.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
