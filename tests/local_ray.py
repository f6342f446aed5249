"""A Ray of this test process, for all that shards or trains on one."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def local_ray(s3_server: S3Server) -> Iterator[str]:
    """The address of a Ray with two CPUs that sharding finds running and leaves running.

    Its workers find the S3 server.
    """
    context: Any = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 << 20,
    )
    yield context.address_info["address"]
    ray.shutdown()
