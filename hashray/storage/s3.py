"""The S3 half of `storage`: a bucket and a prefix behind the same door.

Everything boto3 can raise leaves here as one of our errors; retries and timeouts are boto3's own,
except for a body that breaks off half way and a conditional write that meets another one.
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast, final

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from botocore.config import Config

from hashray.errors import AlreadyExists, InputError, StorageError, StoreUnavailable
from hashray.storage import credentials, requests
from hashray.storage.base import (
    TEMP_PREFIX,
    Level,
    Store,
    check_key,
    check_prefix,
    check_range,
    join,
    no_conditional_put,
)
from hashray.storage.local import file_errors, place, write_synced
from hashray.storage.ranged import TAIL_BYTES, RangedFile

MB = 1 << 20
# One request up to here, multipart above: on loopback Ceph a single put moved 80 MB/s, upload_file 31.
SINGLE_REQUEST_BYTES = 100 * MB
READ_BLOCK_BYTES = 8 * MB
KEYS_A_DELETE = 1000
BODY_ATTEMPTS = 4  # botocore retries a request, but not a body that breaks off half way
# Providers of boto3 that Arrow's SDK asks too.
ARROW_FINDS = {"env", "shared-credentials-file", "iam-role", "container-role", "assume-role-with-web-identity"}
CONFLICT_ATTEMPTS = 6
CONFLICT_WAIT_S = 0.05  # the first wait; each is twice the one before


@final
class S3Store(Store):
    """A bucket and a prefix on S3 or a server that speaks it. Holds no connection, so it can be pickled."""

    def __init__(self, bucket: str, prefix: str = "", endpoint_url: str | None = None) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.endpoint_url = endpoint_url
        self.url = join(f"s3://{bucket}", prefix) if prefix else f"s3://{bucket}"

    def local_path(self, key: str) -> None:
        check_key(key)

    def read(self, key: str) -> bytes:
        with self._errors(key) as where:
            return _read_body(where)[0]

    def read_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        if length == 0:
            return b""
        with self._errors(key) as where:
            part = _read_range(where, f"{start}-{start + length - 1}")
        return part.data if part.is_range else part.data[start : start + length]

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key) as where:
            client = where.pop("client")
            if len(data) > SINGLE_REQUEST_BYTES:
                client.upload_fileobj(io.BytesIO(data), *where.values(), Config=_transfer())
            else:
                client.put_object(**where, Body=data)

    def create(self, key: str, data: bytes) -> None:
        name = join(self.url, check_key(key))
        for attempt in range(CONFLICT_ATTEMPTS):
            with self._errors(key) as where:
                try:
                    where.pop("client").put_object(**where, Body=data, IfNoneMatch="*")
                    return
                except boto.ClientError as error:
                    if _status(error) == 412:
                        raise AlreadyExists(f"{name} already exists") from error
                    if _status(error) == 501:
                        raise StorageError(no_conditional_put(self)) from error
                    if _status(error) != 409:
                        raise
            # 409: another writer is in the middle of the same key; whether it wins is not known yet.
            time.sleep(CONFLICT_WAIT_S * 2**attempt)
        if self.exists(key):
            raise AlreadyExists(f"{name} already exists")
        raise StoreUnavailable(f"{name}: {CONFLICT_ATTEMPTS} conditional writes all met another one; run it again")

    def upload(self, key: str, path: Path) -> None:
        with file_errors(path), path.open("rb") as file, self._errors(key) as where:
            client = where.pop("client")
            if os.fstat(file.fileno()).st_size > SINGLE_REQUEST_BYTES:
                client.upload_file(str(path), *where.values(), Config=_transfer())
            else:
                client.put_object(**where, Body=file)

    def download(self, key: str, path: Path, advance: Callable[[int], None] | None = None) -> None:
        if self.size(key) <= SINGLE_REQUEST_BYTES:
            data = self.read(key)
            fill: Callable[[Path], None] = lambda temp: write_synced(temp, data)  # noqa: E731
            if advance is not None:
                advance(len(data))
        else:
            fill = lambda temp: self._download_large(key, temp, advance)  # noqa: E731
        with file_errors(path, writes=True):
            place(path, fill, os.replace)

    def _download_large(self, key: str, path: Path, advance: Callable[[int], None] | None) -> None:
        with self._errors(key) as where:
            where.pop("client").download_file(*where.values(), str(path), Callback=advance, Config=_transfer())

    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    def size(self, key: str) -> int:
        return int(self._head_of(key)["ContentLength"])

    def modified(self, key: str) -> float:
        return float(self._head_of(key)["LastModified"].timestamp())

    def _head_of(self, key: str) -> dict[str, Any]:
        head = self._head(key)
        if head is None:
            raise InputError(f"{join(self.url, key)} not found{self._at()}; check the path")
        return head

    def _head(self, key: str) -> dict[str, Any] | None:
        with self._errors(key) as where:
            client = where.pop("client")
            try:
                return dict(client.head_object(**where))
            except boto.ClientError as error:
                if _status(error) != 404:
                    raise
            # A HEAD carries no error code: ask for the bucket, or a typo in it would read as "no such object".
            try:
                client.head_bucket(Bucket=self.bucket)
            except boto.ClientError as error:
                if _status(error) == 404:
                    raise StorageError(self._no_bucket()) from error
        return None

    def list(
        self, prefix: str = "", on_error: Callable[[str, OSError], None] | None = None
    ) -> Iterator[tuple[str, int]]:
        for _, files in self._pages(prefix):
            yield from files

    def level(self, prefix: str = "", on_error: Callable[[str, OSError], None] | None = None) -> Level:
        pages = [*self._pages(prefix, Delimiter="/")]
        return [key for keys, _ in pages for key in keys], [file for _, files in pages for file in files]

    def _pages(self, prefix: str, **options: str) -> Iterator[Level]:
        """Yield the common prefixes and the objects (key, bytes) of each page of a listing."""
        check_prefix(prefix)
        base = f"{self.prefix}/" if self.prefix else ""
        while True:
            with self._errors() as where:
                page = where["client"].list_objects_v2(Bucket=self.bucket, Prefix=base + prefix, **options)
            files = [(item["Key"][len(base) :], int(item["Size"])) for item in page.get("Contents", ())]
            # Consoles write "folder/" markers of no bytes: they are no objects of ours.
            yield (
                [item["Prefix"][len(base) :] for item in page.get("CommonPrefixes", ())],
                [(key, size) for key, size in files
                 if key and not key.endswith("/") and not key.rpartition("/")[2].startswith(TEMP_PREFIX)],
            )  # fmt: skip
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        with self._errors(key) as where:
            where.pop("client").delete_object(**where)

    def clear(self, prefix: str) -> None:
        keys = [key for key, _ in self.list(prefix)]
        for start in range(0, len(keys), KEYS_A_DELETE):
            batch = [{"Key": join(self.prefix, key)} for key in keys[start : start + KEYS_A_DELETE]]
            with self._errors() as where:
                deletion = {"Objects": batch, "Quiet": True}
                answer = where["client"].delete_objects(Bucket=self.bucket, Delete=deletion)
            for fault in answer.get("Errors", []):
                raise StorageError(f"{self.url}: {fault['Key']} cannot be deleted: {fault['Code']} {fault['Message']}")

    def open(self, key: str, ranged: bool = False) -> BinaryIO:
        with self._errors(key) as where:  # the first answer says the size, too
            part = _read_range(where, f"-{TAIL_BYTES}" if ranged else f"0-{READ_BLOCK_BYTES - 1}")
        read = partial(self.read_range, key)
        file = RangedFile(read, part.size_bytes, part.start, part.data, keep=ranged)
        return cast(BinaryIO, file if ranged else io.BufferedReader(file, READ_BLOCK_BYTES))

    def _at(self) -> str:
        return f" at {self.endpoint_url}" if self.endpoint_url else ""

    def _no_bucket(self) -> str:
        return (
            f"bucket {self.bucket!r} does not exist{self._at()} ({self.url}); "
            "create it, or check its name and AWS_ENDPOINT_URL / --endpoint-url"
        )

    @contextmanager
    def _errors(self, key: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield client, Bucket and Key, in this order; turn what botocore raises into our errors."""
        path = join(self.prefix, check_key(key)) if key is not None else ""
        try:
            yield {"client": _client(self.endpoint_url), "Bucket": self.bucket, "Key": path}
        except (boto.BotoCoreError, boto.ClientError, Boto3Error) as error:
            self._translate(error, join(self.url, key or ""))

    def _translate(self, error: Exception, name: str) -> NoReturn:
        if isinstance(error, Boto3Error):  # upload_file wraps the cause, and tells it only as text
            inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
            if isinstance(inner, boto.ClientError | boto.BotoCoreError):
                error = inner
        at = self._at() or " at Amazon S3"
        if isinstance(error, boto.ClientError):
            code, status = str(error.response.get("Error", {}).get("Code", "")), _status(error)
            if code == "NoSuchBucket":
                raise StorageError(self._no_bucket()) from error
            if status == 404:
                raise InputError(f"{name} not found{self._at()}; check the path") from error
            if code in ("KeyTooLongError", "InvalidObjectState"):  # a fault of this object, such as one in an archive
                raise InputError(f"{name}: {error}") from error
            if status in (401, 403) or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
                raise StorageError(
                    f"{name}: access denied{at} ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                    "AWS_SESSION_TOKEN or AWS_PROFILE, and that they may read, write and list this bucket "
                    "(without the right to list, a missing object looks the same)"
                ) from error
            if (status >= 500 and status != 501) or status == 429 or code in ("RequestTimeout", "SlowDown"):
                raise StoreUnavailable(
                    f"{name}: the store{at} kept answering {status} {code}; run it again later, finished files are kept"
                ) from error
            raise StorageError(f"{name}: the store{at} refused the request: {error}") from error
        if isinstance(error, boto.ParamValidationError):  # of the name of the bucket or the object
            raise InputError(f"{name}: {error}") from error
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
            with _CLIENTS_LOCK:
                _CLIENTS.clear()  # a client made without credentials would not see them when they come
            raise StorageError(
                f"{name}: no usable credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE, on the driver and on every worker"
            ) from error
        if isinstance(error, boto.ConnectionError | boto.HTTPClientError | boto.IncompleteReadError | Boto3Error):
            raise StoreUnavailable(
                f"{name}: no answer from the store{at} ({error}); check that it runs and that AWS_ENDPOINT_URL / "
                "--endpoint-url is right, then run it again: finished files are kept"
            ) from error
        raise StorageError(f"{name}: {error}") from error


_CLIENTS: dict[tuple[Any, ...], Any] = {}
_CLIENTS_LOCK = threading.Lock()


def arrow_filesystem(store: Store) -> tuple[Any, str]:
    """(pyarrow filesystem, path in it) of a store, for Ray Train's own checkpoints; None is the local one.

    No key is in it where Arrow's SDK finds the same credentials as boto3: each process that it travels to asks the
    provider chain itself, and asks again when a token expires. Arrow does not send a refused request again.
    """
    if not isinstance(store, S3Store):
        return None, store.url
    session = boto3.Session()
    of_session = session.get_credentials()
    keys: dict[str, str | None] = {}
    if of_session is not None and of_session.method not in ARROW_FINDS:
        frozen = of_session.get_frozen_credentials()
        keys = {"access_key": frozen.access_key, "secret_key": frozen.secret_key, "session_token": frozen.token}
    filesystem = pyarrow.fs.S3FileSystem(region=_region(store, session), endpoint_override=store.endpoint_url, **keys)
    return filesystem, f"{store.bucket}/{store.prefix}".rstrip("/")


def _region(store: S3Store, session: Any) -> str:
    """The configured region, else the one where Amazon says that the bucket is; other servers take any."""
    if session.region_name or store.endpoint_url is not None:
        return session.region_name or "us-east-1"
    try:
        return str(pyarrow.fs.resolve_s3_region(store.bucket))
    except OSError as error:
        raise StorageError(f"{store.url}: its region cannot be found ({error}); set AWS_DEFAULT_REGION") from error


def _client(endpoint_url: str | None) -> Any:
    """Return this process's client; changed AWS_* variables make a new one, as does a fork."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = (os.getpid(), endpoint_url, *settings)
    with _CLIENTS_LOCK:
        if key not in _CLIENTS:
            try:
                session = boto3.session.Session()
                client = session.client("s3", endpoint_url=endpoint_url, config=_config(endpoint_url))
            except ValueError as error:
                raise StorageError(f"endpoint {endpoint_url!r} is not a url such as http://host:9000") from error
            requests.watch(client)
            credentials.renew(client, session.get_credentials())
            _CLIENTS[key] = client
        return _CLIENTS[key]


def _config(endpoint_url: str | None) -> Config:
    retries: dict[str, Any] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = 6
    return Config(
        retries=retries,
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Other servers have no DNS name per bucket, and refuse the checksum headers newer SDKs add.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _transfer() -> TransferConfig:
    return TransferConfig(multipart_threshold=SINGLE_REQUEST_BYTES, multipart_chunksize=64 * MB, max_concurrency=8)


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class _Range(NamedTuple):
    """What a request for a range brought: the bytes, where they begin, and the size of the whole object."""

    data: bytes
    start: int
    size_bytes: int
    is_range: bool = True


def _read_range(request: dict[str, Any], span: str) -> _Range:
    """Ask for `span` ("5-9", or "-9": the last 9 bytes); a server that ignores ranges sends the whole object."""
    try:
        data, answer = _read_body({**request, "Range": f"bytes={span}"})
    except boto.ClientError as error:
        if _status(error) == 416:  # starts at or after the end, where a local file reads b""; or the object is empty
            return _Range(b"", 0, 0)
        raise
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
        return _Range(data, 0, len(data), is_range=False)
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer["ContentRange"])
    return _Range(data, int(match[1]), int(match[2])) if match else _Range(data, 0, len(data))


def _read_body(request: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    client = request["client"]
    arguments = {name: value for name, value in request.items() if name != "client"}
    for attempt in range(BODY_ATTEMPTS):
        response = client.get_object(**arguments)
        try:
            # Not `with response["Body"]`: that hands out the stream below, which checks no length.
            with closing(response["Body"]) as body:
                return body.read(), response
        except (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError):
            if attempt == BODY_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")
