"""An S3 server on the loopback (moto, in memory) that can be told to fail, and the environment that leads to it.

The environment stands for the whole session, because Ray's workers inherit it when Ray starts::

    def test_something(s3: Bucket) -> None:
        s3.upload(folder, "images")
        with s3.server.watched(fail_every=3) as requests:
            ...  # reads f"{s3.url}/images", writes f"{s3.url}/out"
        assert any(request.failed for request in requests)
        assert s3.files("out") == {...}
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

INTERNAL_ERROR = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
NO_OTHERS = {  # neither the user's own S3 nor a search for it
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


class Request(NamedTuple):
    """What was asked, as `PUT` and `/bucket/key`, and whether it was answered 500."""

    method: str
    path: str
    failed: bool


@dataclass
class S3Server:
    """The server, as a WSGI application around moto's; `fail_every` counts each method's requests by themselves."""

    serve: Callable[..., Iterable[bytes]]
    fail_every: int = 0
    requests: list[Request] = field(default_factory=list)
    counting: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answers a request, or 500 before S3 has seen it when its turn has come."""
        with self.counting:
            method = environ["REQUEST_METHOD"]
            num_before = sum(request.method == method for request in self.requests)
            fails = self.fail_every > 0 and num_before % self.fail_every == self.fail_every - 1
            self.requests.append(Request(method, environ["PATH_INFO"], fails))
        if not fails:
            return self.serve(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = b"" if environ["REQUEST_METHOD"] == "HEAD" else INTERNAL_ERROR
        start_response("500 Internal Server Error", [("Content-Length", str(len(answer)))])
        return [answer]

    @contextmanager
    def watched(self, fail_every: int = 0) -> Iterator[list[Request]]:
        """Yields the growing list of the block's requests, of which every `fail_every`-th of a method fails."""
        self.fail_every, self.requests = fail_every, []
        try:
            yield self.requests
        finally:
            self.fail_every, self.requests = 0, []


@dataclass
class Bucket:
    """A test's own bucket, seen from outside of the code under test."""

    server: S3Server
    name: str
    client: Any

    @property
    def url(self) -> str:
        """Where the code under test finds it."""
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> None:
        """Puts one object."""
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str) -> None:
        """Puts every file under a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def delete(self, key: str) -> None:
        """Deletes one object."""
        self.client.delete_object(Bucket=self.name, Key=key)

    def files(self, prefix: str) -> dict[str, bytes]:
        """Returns the objects under a prefix by the rest of their keys."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/")
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {
            key.removeprefix(f"{prefix}/"): self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
            for key in keys
        }


class _SilentHandler(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Prints nothing for a request."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The server, and the environment that makes S3 mean this server, in processes that start from here on too."""
    server = S3Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=_SilentHandler)
    endpoint = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**CREDENTIALS, **NO_OTHERS, "AWS_ENDPOINT_URL": endpoint}.items():
            environment.setenv(name, value)
        yield server
    http.shutdown()
    thread.join()


@pytest.fixture
def s3(s3_server: S3Server) -> Bucket:
    """An empty bucket."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    name = f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return Bucket(s3_server, name, client)
