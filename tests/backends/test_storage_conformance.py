"""Every storage backend of ours passes the suite that plugin authors use, against a real server or a real directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from nixl_async.testing.servers import Server
from nixl_async.testing.storage import StorageBackendTests
from tests.stores import fresh_prefix, s3_options


class TestDirectory(StorageBackendTests):
    backend = "directory"

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/store"


class TestDirectoryDirect(StorageBackendTests):
    backend = "directory"

    @pytest.fixture
    def store_url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/store"

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"direct": True, "fsync": True}


class TestS3(StorageBackendTests):
    backend = "s3"
    # S3 takes no smaller parts.
    large_nbytes = 12 << 20
    large_options: ClassVar = {"multipart_nbytes": 8 << 20, "part_nbytes": 5 << 20, "range_nbytes": 3 << 20}

    @pytest.fixture
    def store_url(self, seaweed: Server) -> str:
        return f"s3://bench/{fresh_prefix()}"

    @pytest.fixture
    def options(self, seaweed: Server) -> dict[str, Any]:
        return s3_options(seaweed)


class TestS3Checksums(TestS3):
    @pytest.fixture
    def options(self, seaweed: Server) -> dict[str, Any]:
        return {**s3_options(seaweed), "checksum": "crc64nvme", "payload": "unsigned"}


class TestAzure(StorageBackendTests):
    backend = "azure"
    large_nbytes = 8 << 20
    large_options: ClassVar = {"block_threshold_nbytes": 2 << 20, "block_nbytes": 1 << 20, "range_nbytes": 1 << 20}

    @pytest.fixture
    def store_url(self, azure_server: Server) -> str:
        return f"az://bench/{fresh_prefix()}"

    @pytest.fixture
    def options(self, azure_server: Server) -> dict[str, Any]:
        return {"connection_string": azure_server.connection_string}


class TestGCS(StorageBackendTests):
    backend = "gcs"
    # The emulator does not know ifGenerationMatch.
    conditional = False
    # It shows what came before the connection broke, and decodes names twice.
    atomic = False
    keys: ClassVar = tuple(key for key in StorageBackendTests.keys if "%" not in key)
    # It reads a request's body and answers on one thread.
    large_nbytes = 8 << 20
    many = 60

    @pytest.fixture
    def store_url(self, gcs_server: Server) -> str:
        return f"gs://bench/{fresh_prefix()}"

    @pytest.fixture
    def options(self, gcs_server: Server) -> dict[str, Any]:
        return {"api_root": gcs_server.endpoint}
