"""SGLang: `--disaggregation-transfer-backend nixl_async` moves KV caches from prefill to decode servers with this library.

SGLang calls `register` in each of its processes, through the entry point group `sglang.srt.plugins`. What it needs of SGLang's own
disaggregation is imported when SGLang first asks for it.

Settings, from the environment: `NIXL_ASYNC_TOKEN`, the secret that prefill and decode servers share (without one, each decode rank
makes its own and tells it to the prefill ranks it registers with, in the clear, as all of SGLang's control messages are);
`NIXL_ASYNC_SGLANG_BACKENDS`, backends by name, the preferred first and separated by commas (default: all that are there).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

BACKEND_NAME = "nixl_async"
"""What the backend is called on SGLang's command line."""


def register() -> None:
    """Add the transfer backend `nixl_async` to this process's SGLang.

    Called by `sglang.srt.plugins.load_plugins`, which applies the hooks afterwards. Calling it again changes nothing.
    """
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
    from sglang.srt.disaggregation import utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_disagg_transfer_backend_choices

    if BACKEND_NAME in DISAGG_TRANSFER_BACKEND_CHOICES:
        return
    place = utils.__name__
    members = {member.name: member.value for member in utils.TransferBackend} | {BACKEND_NAME.upper(): BACKEND_NAME}
    # An Enum cannot be extended. SGLang puts this one into every module that has imported the original.
    extended = Enum("TransferBackend", members, module=place)  # type: ignore[misc]
    HookRegistry.register(f"{place}.TransferBackend", extended, HookType.REPLACE)
    HookRegistry.register(f"{place}.get_kv_class", kv_class, HookType.AROUND)
    add_disagg_transfer_backend_choices([BACKEND_NAME])


def kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Return the class of our backend for a `KVClassType`; for every other backend what SGLang's `get_kv_class` returns."""
    if transfer_backend.value != BACKEND_NAME or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from nixl_async.integrations.sglang import conn

    return {
        "manager": conn.NixlAsyncKVManager,
        "sender": conn.NixlAsyncKVSender,
        "receiver": conn.NixlAsyncKVReceiver,
        "bootstrap_server": conn.NixlAsyncKVBootstrapServer,
    }.get(class_type.value)
