"""Every error a user can meet, as one tree.

HashrayError
├── RequestError            the request is wrong; nothing was started           exit 2
│   ├── ConfigError         a config file or a flag does not validate
│   ├── InputError          a path, file, label or row that was given is not usable
│   ├── MismatchError       two artifacts do not belong together (model, width, version)
│   └── StorageError        bucket, credentials or endpoint do not work
└── RunError                the request was fine, the run failed                exit 1
    ├── TooManyBadRows      more rows went to quarantine than --max-bad allows
    ├── CorruptArtifact     a file differs from its manifest, or the manifest is missing
    ├── AlreadyExists       somebody published this name first
    ├── StoreUnavailable    the object store stopped answering
    ├── ServiceUnavailable  a running hashray serve does not answer a client
    ├── Diverged            the loss of a training is not finite
    ├── WorkersLost         a training lost its workers more often than max_failures
    └── AuditError          rows in are not rows out plus rows quarantined

The text of an error says what was found, where, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HashrayError(Exception):
    """Base of all errors that are meant for the user; `exit_code` is the process's."""

    exit_code = 1


class RequestError(HashrayError):
    """The request is wrong: nothing was started, nothing was written."""

    exit_code = 2


class ConfigError(RequestError):
    """A config file or a command-line flag does not validate."""


class InputError(RequestError):
    """A path, file, label or row that was given cannot be used."""


class MismatchError(RequestError):
    """Two artifacts do not belong together."""


class StorageError(RequestError):
    """The bucket, the credentials or the endpoint do not work."""


class RunError(HashrayError):
    """The request was fine, the run failed."""


class TooManyBadRows(RunError):
    """More rows went to quarantine than `--max-bad` allows."""


class CorruptArtifact(RunError):
    """A file is missing, or differs from what its manifest says."""


class AlreadyExists(RunError):
    """The name is taken: somebody published it first."""


class StoreUnavailable(RunError):
    """The object store stopped answering, after all retries."""


class ServiceUnavailable(RunError):
    """A running `hashray serve` does not answer, after all retries."""


class Diverged(RunError):
    """The loss of a training is not finite."""


class WorkersLost(RunError):
    """A training lost its workers more often than `max_failures` allows."""


class AuditError(RunError):
    """Rows in are not rows out plus rows quarantined."""


def perhaps(word: str, allowed: Iterable[str]) -> str:
    """Return ", perhaps you meant 'x'?" for the nearest allowed word, or an empty string.

    >>> perhaps("num_bit", ["num_bits", "seed"])
    ", perhaps you meant 'num_bits'?"
    >>> perhaps("zzz", ["num_bits", "seed"])
    ''
    """
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f", perhaps you meant {near[0]!r}?" if near else ""
