"""What all tests share: a real S3 server on the loopback, a fresh bucket per test, one Ray session."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

pytest_plugins = ["browsing"]  # fixtures of the tests of pages

# A deadline is a wall clock in disguise; a loaded machine may take any time.
settings.register_profile("hashray", deadline=None)
settings.load_profile("hashray")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Start moto's HTTP server and point AWS_* at it, for this process and for Ray workers started later.

    HASHRAY_TEST_S3 names a server to use instead, with the keys in AWS_*: `make test-s3-real`.
    """
    if real := os.environ.get("HASHRAY_TEST_S3"):
        os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
        os.environ["AWS_ENDPOINT_URL"] = real
        yield real
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in before:
        del os.environ[name]
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
        # Nothing of the machine's own account may reach a test.
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
    )
    yield endpoint
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(before)
    server.stop()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shards of test indexes are cached apart from the user's own."""
    os.environ["HASHRAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """The url of an empty prefix in a bucket of this test's own."""
    import boto3

    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[Any]:
    """One local Ray for the whole session; its workers inherit the environment of `s3_server`."""
    import ray

    from hashray.engine.session import start_local

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start_local(num_cpus=4, object_store_memory=600 * 1024**2)
    yield ray
    ray.shutdown()


@pytest.fixture
def free_port() -> int:
    """A port of the loopback at which nothing listens."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
