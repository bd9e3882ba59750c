"""The AWS common runtime's S3 client in Python: it chooses connections and parts itself, we copy what it hands over."""

from __future__ import annotations

import io
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from plain import Array, Measured, Stored, allocate, serve

GBPS = 10.0


class Awscrt(Stored):
    def opened(self) -> Any:
        from awscrt.auth import AwsCredentialsProvider
        from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
        from awscrt.s3 import S3Client, S3RequestTlsMode, create_default_s3_signing_config

        given, url = self.options["store_options"], urlsplit(self.options["store_url"])
        endpoint = urlsplit(given.get("endpoint_url", ""))
        if url.scheme != "s3" or not endpoint.netloc or given.get("addressing") == "virtual":
            raise RuntimeError("awscrt is measured with S3 at --obj-endpoint-override and the bucket in the path")
        self.bucket, self.host = url.netloc, endpoint.netloc
        bootstrap = ClientBootstrap(group := EventLoopGroup(), DefaultHostResolver(group))
        if "access_key" in given:
            provider = AwsCredentialsProvider.new_static(given["access_key"], given["secret_key"], given.get("session_token"))
        else:
            provider = AwsCredentialsProvider.new_default_chain(bootstrap)
        secure = endpoint.scheme == "https"
        self.client = S3Client(
            bootstrap=bootstrap,
            region=given["region"],
            tls_mode=S3RequestTlsMode.ENABLED if secure else S3RequestTlsMode.DISABLED,
            signing_config=create_default_s3_signing_config(region=given["region"], credential_provider=provider),
            throughput_target_gbps=GBPS,
        )
        self.keys: set[str] = set()

    def _key(self, number: int) -> str:
        key = f"nixl-async-bench-{self.options['run']}/awscrt/{self.index}/{self.point.block}/{number}"
        self.keys.add(key)
        return key

    def put(self, content: Array) -> None:
        self._everything("PUT", content)

    def fetch(self) -> Array:
        content = allocate(self.n_blocks * self.point.block)
        self._everything("GET", content)
        return content

    def _everything(self, method: str, content: Array) -> None:
        nbytes = self.point.block
        self._move(method, memoryview(content), list(range(self.n_blocks)), [n * nbytes for n in range(self.n_blocks)])

    def _move(self, method: str, view: memoryview, numbers: list[int], offsets: list[int]) -> None:
        ended = threading.Semaphore(0)
        failed: list[Any] = []

        def done(error: Any = None, **_: Any) -> None:
            if error is not None:
                failed.append(error)
            ended.release()

        nbytes = self.point.block
        # Whoever drops a request cancels it.
        requests = [
            self._request(method, self._key(number), view[offset : offset + nbytes], done)
            for number, offset in zip(numbers, offsets)
        ]
        for _ in requests:
            ended.acquire()
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]!r}")

    def _request(self, method: str, key: str, view: memoryview, done: Any) -> Any:
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.s3 import S3RequestType

        def body(chunk: Any, offset: int, **_: Any) -> None:
            view[offset : offset + len(chunk)] = chunk

        headers = HttpHeaders([("host", self.host)])
        stream, receive, kind = None, None, S3RequestType.DEFAULT
        if method == "PUT":
            headers.add("content-length", str(len(view)))
            stream, kind = io.BytesIO(view), S3RequestType.PUT_OBJECT
        elif method == "GET":
            receive, kind = body, S3RequestType.GET_OBJECT
        request = HttpRequest(method, f"/{self.bucket}/{key}", headers, stream)
        more = {"operation_name": "DeleteObject"} if method == "DELETE" else {}
        return self.client.make_request(type=kind, request=request, on_body=receive, on_done=done, **more)

    def aimed(self) -> None:
        flow = self.flows[0]
        slots = range(self.point.slots)
        self.requests = [(self.numbers(slot).tolist(), self.point.near(flow, slot).tolist()) for slot in slots]

    def run(self, iterations: int) -> Any:
        """Make one slot's request after the other; the objects of one go at the same time."""
        measured = Measured()
        view, method = memoryview(self.buffer), "PUT" if self.point.op == "WRITE" else "GET"
        measured.begin()
        for number in range(iterations):
            called = time.perf_counter()
            self._move(method, view, *self.requests[number % len(self.requests)])
            measured.add(0.0, 0.0, time.perf_counter() - called)
            measured.nbytes += self.point.block * self.point.batch
            self.meter.tell(measured.nbytes)  # type: ignore[attr-defined]
        measured.end()
        return measured.as_dict(route="s3")

    def close(self) -> None:
        ended = threading.Semaphore(0)
        empty = memoryview(bytearray(0))
        requests = [self._request("DELETE", f"{key}", empty, lambda **_: ended.release()) for key in getattr(self, "keys", ())]
        for _ in requests:
            ended.acquire(timeout=1)


if __name__ == "__main__":
    serve(Awscrt())
