"""The backend is found by its entry point, and is one like SGLang's own from then on."""

from __future__ import annotations

import argparse

import pytest


@pytest.fixture(scope="module")
def loaded() -> None:
    # Imported before the hooks are applied, as by whoever starts SGLang: it has the original names.
    import sglang.srt.managers.disagg_service  # noqa: F401
    from sglang.srt.plugins import load_plugins

    load_plugins()


def test_it_can_be_chosen_on_the_command_line(loaded: None) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    chosen = ["--model-path", "m", "--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "nixl_async"]
    assert parser.parse_args(chosen).disaggregation_transfer_backend == "nixl_async"


def test_whoever_asks_for_its_classes_gets_them(loaded: None) -> None:
    from sglang.srt.disaggregation import utils
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.managers import disagg_service

    from nixl_async.integrations.sglang import conn

    assert disagg_service.TransferBackend is utils.TransferBackend
    ours = disagg_service.TransferBackend("nixl_async")
    found = {kind.value: disagg_service.get_kv_class(ours, kind) for kind in utils.KVClassType}
    assert found == {
        "kvargs": KVArgs,
        "manager": conn.NixlAsyncKVManager,
        "sender": conn.NixlAsyncKVSender,
        "receiver": conn.NixlAsyncKVReceiver,
        "bootstrap_server": conn.NixlAsyncKVBootstrapServer,
    }
    assert disagg_service.rust_server_serves_kv_bootstrap("nixl_async")


def test_the_others_are_as_before(loaded: None) -> None:
    from sglang.srt.disaggregation import utils
    from sglang.srt.disaggregation.fake import FakeKVSender

    assert {"mooncake", "nixl", "mori", "ascend", "fake"} < {member.value for member in utils.TransferBackend}
    assert utils.get_kv_class(utils.TransferBackend.FAKE, utils.KVClassType.SENDER) is FakeKVSender
    with pytest.raises(ValueError, match="mooncake_udp"):
        utils.TransferBackend("mooncake_udp")


def test_registering_again_changes_nothing(loaded: None) -> None:
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
    from sglang.srt.disaggregation import utils

    from nixl_async.integrations.sglang import register

    before = utils.TransferBackend
    register()
    assert DISAGG_TRANSFER_BACKEND_CHOICES.count("nixl_async") == 1
    assert utils.TransferBackend is before
