"""Who a client is."""

import pytest
from flwr.app import Context, RecordDict

from fedloru_flwr.clients import client_identity


@pytest.mark.parametrize(
    ("node_config", "expected"),
    [
        ({"client-id": "hospital-3", "partition-id": 7}, "hospital-3"),
        ({"client-id": 12}, "12"),
        ({"client-id": "", "partition-id": 7}, "7"),
        ({"partition-id": 0}, "0"),
        ({"client-id": 0, "partition-id": 5}, "0"),
        ({}, "node-42"),
        ({"num-partitions": 3}, "node-42"),
    ],
)
def test_the_client_id_comes_before_the_partition_id_and_that_before_the_node_id(node_config, expected):
    context = Context(run_id=1, node_id=42, node_config=node_config, state=RecordDict(), run_config={})
    assert client_identity(context) == expected
