"""A stage and its artifact: published once, however many runs work on it."""

from __future__ import annotations

from collections.abc import Callable

from hashray import artifact
from hashray.artifact import MANIFEST, Manifest, version_key
from hashray.errors import AlreadyExists, HashrayError, InputError
from hashray.progress import say
from hashray.storage import Store
from hashray.storage.requests import counting

PROBE = "progress/is-writable"


class FinishedElsewhere(HashrayError):
    """Another run of the same plan published this artifact first. Never leaves this file."""


def run_stage(
    store: Store, kind: str, plan: str, work: Callable[[], Manifest], name: str = "plan", key: str = MANIFEST
) -> Manifest:
    """Return the artifact of this plan: the finished one, or what `work` publishes. Rerun = resume.

    Where another run of the same plan publishes it first, that artifact counts, whatever became of this run.

    Args:
        name: what the manifest's info calls its plan.
        key: where the manifest stands.

    Raises:
        MismatchError: what is finished there is of another kind. AlreadyExists: it is another plan's.
        CorruptArtifact: it is this plan's, and a file of it is missing or has another size.
        InputError, StorageError: nothing can be written there.
    """
    with counting(kind):
        return _run_once(store, kind, plan, work, name, key)


def _run_once(store: Store, kind: str, plan: str, work: Callable[[], Manifest], name: str, key: str) -> Manifest:
    manifest = _finished(store, kind, plan, name, key)
    if manifest is not None:
        rows = "" if manifest.rows_out is None else f": {manifest.rows_out:,} rows"
        say(f"{store.url} is finished already{rows}")
        return manifest
    _require_writable(store)
    try:
        return work()
    except Exception as error:
        manifest = _finished(store, kind, plan, name, key)
        if manifest is None:
            raise
        if not isinstance(error, FinishedElsewhere):
            say(f"note: this run ended with: {error}")
        say(f"{store.url}: finished by another run")
        return manifest


def _finished(store: Store, kind: str, plan: str, name: str, key: str) -> Manifest | None:
    if not artifact.is_finished(store, key):
        return None
    manifest = artifact.load_manifest(store, kind, key)
    refuse_other(store, manifest, plan, name)
    artifact.check_sizes(store, manifest)
    for left in ("progress/", "checkpoints/"):  # by a run that was killed between its manifest and its tidying
        store.clear(left)
    return manifest


def _require_writable(store: Store) -> None:
    """Find out before the work, not after it, that its results cannot be kept."""
    try:
        store.write(PROBE, b"")
        store.clear(PROBE)  # with the folder, where nothing else is in it
    except HashrayError as error:
        raise type(error)(f"--out {store.url} cannot be written: {error}") from error


def require_free(store: Store, plan: str, name: str = "plan", key: str = MANIFEST) -> None:
    """Return where nothing is finished yet, before anything is written or published there.

    Raises:
        AlreadyExists: the finished artifact of another plan is there.
        FinishedElsewhere: another run of this plan has published it.
    """
    if artifact.is_finished(store, key):
        refuse_other(store, artifact.load_manifest(store, key=key), plan, name)
        raise FinishedElsewhere(f"{store.url} is finished")


def require_no_artifact(store: Store, what: str) -> None:
    """Refuse to write `what` into the folder of a finished artifact.

    Raises:
        InputError: one is finished there.
    """
    for key in (MANIFEST, version_key(1)):
        if artifact.is_finished(store, key):
            kind = artifact.load_manifest(store, key=key).kind
            raise InputError(f"--out {store.url} is a finished {kind}: {what} need a folder that is no artifact")


def refuse_other(store: Store, manifest: Manifest, plan: str, name: str = "plan") -> None:
    """Raise AlreadyExists where a finished artifact is of another plan."""
    if manifest.info.get(name) != plan:
        raise AlreadyExists(
            f"{store.url} holds a finished {manifest.kind} ({manifest.id[:12]}) of another input or configuration. "
            "Nothing was changed there. Choose another --out, or delete the folder to make it again"
        )
