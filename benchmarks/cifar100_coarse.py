"""CIFAR-100 with the fine and the coarse class of each image, as list files with multi-hot rows.

python benchmarks/cifar100_coarse.py FOLDER coarse.json --out LISTS

FOLDER has train/CLASS/file and test/CLASS/file; coarse.json maps each fine class to its superclass. LISTS gets
train.txt and test.txt (path, then 0 or 1 for each class) and, for --class-names, the file `classes`: the fine
classes that occur, then the coarse.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Write the lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("coarse", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    coarse = json.loads(wanted.coarse.read_text())
    fine = sorted(path.name for path in (wanted.folder / "train").iterdir())
    names = fine + sorted({coarse[name] for name in fine})
    wanted.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = []
        for path in sorted((wanted.folder / split).glob("*/*")):
            labels = {path.parent.name, coarse[path.parent.name]}
            lines.append(" ".join([str(path.absolute()), *("1" if name in labels else "0" for name in names)]))
        (wanted.out / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (wanted.out / "classes").write_text("\n".join(names) + "\n")
    print(f"{wanted.out}: {len(names)} classes, {len(fine)} fine and {len(names) - len(fine)} coarse")


if __name__ == "__main__":
    main()
