"""The AWS common runtime's S3 client in Python: it chooses connections and parts itself, we copy what it hands over."""

from __future__ import annotations

import io
import threading
from typing import Any

from bench.worker import serve
from bench.workers.stored import Stored


class Awscrt(Stored):
    """One client; its concurrency follows from the throughput it is told to aim at."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Make the client."""
        from awscrt.auth import AwsCredentialsProvider
        from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
        from awscrt.s3 import S3Client, S3RequestTlsMode, create_default_s3_signing_config

        self.allocate(nbytes)
        group = EventLoopGroup()
        provider = AwsCredentialsProvider.new_static(options["access_key"], options["secret_key"])
        self.bucket, self.host = options["bucket"], options["endpoint"].partition("://")[2]
        self.at_once = options["at_once"]
        self.client = S3Client(
            bootstrap=ClientBootstrap(group, DefaultHostResolver(group)),
            region=options["region"],
            tls_mode=S3RequestTlsMode.DISABLED,
            signing_config=create_default_s3_signing_config(region=options["region"], credential_provider=provider),
            throughput_target_gbps=options["gbps"],
        )

    def move(self) -> dict[str, float]:
        """Move every object once, `at_once` requests at the same time."""
        room = threading.Semaphore(self.at_once)
        failed: list[Any] = []

        def done(error: Any = None, **_: Any) -> None:
            if error is not None:
                failed.append(error)
            room.release()

        # Whoever drops a request cancels it.
        requests = []
        with self.timed():
            for place, number in enumerate(self.order.tolist()):
                room.acquire()
                requests.append(self._request(place, self.where["keys"][number], done))
            for _ in range(self.at_once):
                room.acquire()
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]!r}")
        return self.measured

    def _request(self, place: int, key: str, done: Any) -> Any:
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.s3 import S3RequestType

        view = self.buffer.data[place * self.page_nbytes : (place + 1) * self.page_nbytes]

        def body(chunk: Any, offset: int, **_: Any) -> None:
            view[offset : offset + len(chunk)] = chunk

        headers = HttpHeaders([("host", self.host)])
        if self.write:
            headers.add("content-length", str(len(view)))
            kind, method, stream, receive = S3RequestType.PUT_OBJECT, "PUT", io.BytesIO(view), None
        else:
            kind, method, stream, receive = S3RequestType.GET_OBJECT, "GET", None, body
        request = HttpRequest(method, f"/{self.bucket}/{key}", headers, stream)
        return self.client.make_request(type=kind, request=request, on_body=receive, on_done=done)


if __name__ == "__main__":
    serve(Awscrt())
