"""What a finished stage leaves, and proof of it.

A stage is finished when its manifest is there, and a reader opens manifests, never listings. The
stored bytes are the canonical JSON of `Manifest` plus its own "id", so a changed byte anywhere in an
artifact, manifest included, is found. Nothing here knows the time: a rerun publishes the same bytes.

artifact/manifest.json            corpus, features, pseudo-labels, model, sweep, codes, evaluation
index/versions/00000001.json ...  an index: each version a manifest, the newest is the index
files-<hash>.parquet              the records of more than 1,000 files; the manifest holds its sha256 in their place
tables/<hash>.parquet             the files of an index's version, in a few tables that versions share
"""

from hashray.artifact.manifest import (
    FORMAT_VERSION,
    QUARANTINE,
    FileRecord,
    Manifest,
    canonical,
    plain_name,
    sha256_hex,
)
from hashray.artifact.publish import (
    MANIFEST,
    check_sizes,
    publish,
    read_file,
    write_file,
    write_named,
    write_plain,
)
from hashray.artifact.tables import read_columns, read_table, table_bytes
from hashray.artifact.verify import describe, verify
from hashray.artifact.versions import is_finished, load_manifest, newest_version, version_key

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "QUARANTINE",
    "FileRecord",
    "Manifest",
    "canonical",
    "check_sizes",
    "describe",
    "is_finished",
    "load_manifest",
    "newest_version",
    "plain_name",
    "publish",
    "read_columns",
    "read_file",
    "read_table",
    "sha256_hex",
    "table_bytes",
    "verify",
    "version_key",
    "write_file",
    "write_named",
    "write_plain",
]
