"""What goes over HTTP: from a client to a decode server, and from there to a prefill server. The KV cache goes by nixl_async."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

Token = Annotated[int, Field(ge=0, lt=256)]


class GenerateRequest(BaseModel):
    """What a client asks a decode server: `POST /generate`.

    The answer is JSON lines, each as soon as it is there: `{"token": 17}` for each token, then `{"done": true}`, or
    `{"error": "…"}` where the request fails after its answer has begun.
    """

    prompt: Annotated[str | list[Token], Field(min_length=1)]
    """Text, whose bytes are the tokens; or tokens."""
    max_tokens: Annotated[int, Field(ge=1)] = 32
    """How many tokens to generate."""
    overlap: bool = True
    """Whether layers are sent while later ones are computed. There to measure what that brings."""

    @property
    def tokens(self) -> list[int]:
        """The prompt's tokens."""
        return list(self.prompt.encode()) if isinstance(self.prompt, str) else self.prompt


class PrefillRequest(BaseModel):
    """What a decode server asks a prefill server: `POST /prefill`. The answer, 202, comes before the work is done.

    All else is between the two agents: the prefill server pushes the layers of `request` into `pages` of the region "kv" of the
    agent `decode`; which side gives up, and why, reaches the other side by the push.
    """

    request: str
    """What both agents call the request."""
    prompt: Annotated[list[Token], Field(min_length=1)]
    decode: str
    """The name of the decode server's agent, which is connected to the prefill server's."""
    incarnation: str
    """Which life of that agent: a decode server that was replaced has the same name."""
    pages: list[int]
    """Where the KV cache goes: page i of the prompt into `pages[i]`."""
    overlap: bool = True
    """See `GenerateRequest`."""
