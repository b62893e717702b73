"""Who a client is, whatever machine it runs on."""

from flwr.app import Context


def client_identity(context: Context) -> str:
    """The client's logical identity: node config ``client-id``, else ``partition-id``, else the node id.

    A deployed node's id is authenticated where SuperNodes register with keys. The identity decides the client's
    random streams and what the server believes it holds; it is hashed before it names a file.
    """
    for key in ("client-id", "partition-id"):
        if (value := context.node_config.get(key)) not in (None, ""):
            return str(value)
    return f"node-{context.node_id}"
