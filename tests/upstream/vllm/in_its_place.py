"""Let vLLM's tests of the schedulers' part in transfers, which name its NixlConnector, meet ours instead: `-p in_its_place`."""


def pytest_configure(config):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from nixl_async.integrations.vllm import NixlAsyncConnector

    KVConnectorFactory._registry["NixlConnector"] = lambda: NixlAsyncConnector
