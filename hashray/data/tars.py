"""Tar shards as a source, as WebDataset writes them: members of one name are one sample. No Ray."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

from hashray.data.images import image_endings
from hashray.data.labels import split_of_path, whole_number
from hashray.data.listing import SourceConfig, SourceRow, Survey, Unit, kind_of_junk
from hashray.errors import InputError
from hashray.storage import join

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LABEL_ENDINGS = ("cls", "label", "json", "txt")
JSON_LABELS = ("labels", "label", "class_id", "class", "class_name", "target", "fine_label", "category")
TAR_BLOCK_BYTES = 512


@dataclass
class _Shard:
    """The samples of one tar: image member and label by sample name, and names of the images that are lost."""

    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    members: int = 0


def refuse_compressed(key: str) -> None:
    """Raise InputError for a compressed tar: no image in it has a place of its own."""
    if key.lower().endswith(COMPRESSED):
        raise InputError(f"{key} is a compressed tar, in which no image can be read alone; decompress it to .tar first")


def scan_tars(survey: Survey, unit: Unit, config: SourceConfig) -> Iterator[SourceRow]:
    """Yield the samples of WebDataset shards, in order: members of one key (the name up to its first dot) are one.

    Its label is in `.cls` or `.label`, else `.json` (under a usual name), else `.txt`; it may stand in another shard
    than the image. A shard's split is a word of its name ("imagenet1k-train-0000.tar") or of its folder's.
    """
    for key in survey.take((".tar",)):
        refuse_compressed(key)
        shard = _read_tar(survey, key)
        url, split = join(survey.store.url, key), split_of_path(key)
        survey.members += shard.members
        survey.members_skipped += shard.skipped
        for sample, value in shard.labels.items():
            if sample not in shard.images:
                survey.elsewhere.setdefault(sample, []).append(value)
        for sample, reason in shard.lost.items():
            survey.lose(f"{key}/{sample}", reason)
        for sample, member in shard.images.items():
            locator = f"{url}#offset={member.offset_data}&size={member.size}"
            place = f"{url}, member {member.name}"
            yield SourceRow(f"{key}/{sample}", locator, shard.labels.get(sample), split, member.size, place)


def _read_tar(survey: Survey, key: str) -> _Shard:
    url, shard = join(survey.store.url, key), _Shard()
    ranks: dict[str, int] = {}
    dotted: dict[str, str] = {}
    members: dict[str, tarfile.TarInfo] = {}
    endings = image_endings()
    try:
        with survey.store.open(key) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.lower().partition(".")
                if member.isdir():
                    continue
                shard.members += 1
                members[normpath(member.name)] = member
                junk = kind_of_junk(member.name) if stem else "hidden"
                if junk is not None:
                    shard.skipped[junk] += 1
                    continue
                sample = str(path.with_name(path.name[: len(stem)]))
                if f".{suffix}" in endings:
                    if sample in shard.images:
                        raise InputError(
                            f"{url}: {shard.images[sample].name} and {member.name} are two images of one sample; "
                            "a sample, named up to the first dot, may hold one"
                        )
                    shard.images[sample] = member
                elif suffix in LABEL_ENDINGS and member.isfile():
                    rank, content = LABEL_ENDINGS.index(suffix), tar.extractfile(member)
                    value = _label(content.read() if content else b"", suffix, f"{url}, member {member.name}")
                    if value is not None and rank <= ranks.get(sample, rank):
                        shard.labels[sample], ranks[sample] = value, rank
                elif suffix.endswith(endings):
                    dotted.setdefault(sample, member.name)
                else:
                    shard.skipped[f".{suffix}" if suffix else "no ending"] += 1
            handle.seek(tar.offset)
            if not handle.read(TAR_BLOCK_BYTES):
                raise InputError(f"{url} has no end mark: it was cut off, and images may be missing; copy it again")
    except tarfile.TarError as error:
        raise InputError(f"{url} is not an uncompressed tar file, or cut off: {error}") from error
    for sample, name in dotted.items():
        if sample not in shard.images:
            raise InputError(
                f"{url}: {name} has a dot inside its name; a sample is named up to the first dot, "
                "and this one has no image but that: rename it"
            )
        shard.skipped[PurePosixPath(name).suffix.lower()] += 1
    _follow_links(shard, members)
    return shard


def _follow_links(shard: _Shard, members: dict[str, tarfile.TarInfo]) -> None:
    """Read a link inside the archive as the file that it names; one that leads nowhere is lost, with the reason."""
    for sample, member in list(shard.images.items()):
        seen = set[str]()
        target = member
        while not target.isfile():
            name = target.linkname if target.islnk() else str(PurePosixPath(target.name).parent / target.linkname)
            following = members.get(normpath(name)) if target.islnk() or target.issym() else None
            if following is None or target.name in seen:
                shard.lost[sample] = f"{member.name} is a link to {member.linkname!r}, which is not in this archive"
                del shard.images[sample]
                break
            seen.add(target.name)
            target = following
        else:
            shard.images[sample] = target


def _label(data: bytes, suffix: str, place: str) -> Any:
    try:
        value: Any = json.loads(data) if suffix == "json" else data.decode("utf-8").strip()
    except ValueError as error:
        raise InputError(f"{place} is not {'JSON' if suffix == 'json' else 'UTF-8 text'}: {error}") from error
    if isinstance(value, dict):
        value = next((value[name] for name in JSON_LABELS if name in value), None)
    if not isinstance(value, str):
        return value
    numbers = [whole_number(word) for word in value.split()]
    if not numbers or None in numbers:
        return value or None
    return numbers if len(numbers) > 1 else numbers[0]
