"""Train ITQ (Gong and Lazebnik, CVPR 2011), or PCA with a random rotation, on Ray Train. Neither needs labels.

    ray job submit --working-dir . -- python jobs/train_itq.py jobs/configs/itq_photos.toml --corpus … --out …

This runs `hashray train` with the same arguments.
"""

import sys

from hashray.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
