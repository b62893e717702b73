"""What the documents say is true: settings, defaults, snippets."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server import strategy as legacy
from flwr.serverapp import ServerApp
from make_settings_table import PATH, table
from torch import nn

from fedloru_flwr.config import RunConfig, name_to_key
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.rank.spec import Measure, parse_rank_spec

ROOT = Path(__file__).parent.parent


def test_the_table_of_settings_is_that_of_the_package():
    assert PATH.read_text() == table(), "write it anew: python tests/make_settings_table.py"


def test_the_readme_gives_the_real_keys_and_defaults():
    defaults = RunConfig().as_mapping()
    table_of_readme = (ROOT / "README.md").read_text().split("## Settings")[1].split("## In your own")[0]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", table_of_readme, re.MULTILINE)
    assert len(rows) >= 10
    for keys, values in rows:
        for key, value in zip(
            re.findall(r"`([^`]+)`", keys), re.findall(r"`([^`]*)`|(a time stamp)", values), strict=True
        ):
            shown = value[0].strip('"')
            default = defaults[key]
            assert (str(default).lower() if isinstance(default, bool) else str(default)) == shown, key


def test_every_link_of_the_documents_leads_somewhere():
    pages = (ROOT / "examples").rglob("README.md")
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", *pages]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def my_training_loop(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def blocks(document: str, first_line: str) -> str:
    found = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in found if block.startswith(first_line)]
    return block


@pytest.mark.parametrize("document", ["README.md", "docs/drop-in.md"])
def test_the_drop_in_snippets_run_as_they_stand(document):
    samples = torch.utils.data.TensorDataset(torch.randn(20, 12), torch.randint(3, (20,)))
    loader = torch.utils.data.DataLoader(samples, batch_size=5, shuffle=True)
    client = ClientApp()
    names = {
        "Net": Net,
        "app": client,
        "my_training_loop": my_training_loop,
        "my_loader": loader,
        "test": lambda m: 0.5,
    }
    exec(blocks(document, "# client_app.py"), names)
    server = ServerApp()
    kept = {}

    @server.main()
    def main(grid, context):
        exec(
            blocks(document, "# server_app.py").replace("num_rounds=50", "num_rounds=11"),
            kept | names | {"grid": grid},
            kept,
        )

    run_in_process(server, client, num_supernodes=4)
    assert kept["strategy"].state.ledger.version == 1
    Net().load_state_dict(kept["state_dict"])


def test_the_trackers_of_the_tracking_page_are_told_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"Net": Net, "app": (client := ClientApp()), "my_training_loop": lambda model, loader: 0.5, "my_loader": []}
    names["my_loader"] = torch.utils.data.DataLoader(range(8))
    exec(blocks("docs/drop-in.md", "# client_app.py"), names)
    server = ServerApp()

    @server.main()
    def main(grid, context):
        exec(blocks("docs/tracking.md", "# server_app.py"), names)
        names["strategy"].start(grid, names["strategy"].initial_arrays(), num_rounds=2)

    run_in_process(server, client, num_supernodes=2)
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    first, second = rows[0]["bytes_up"], rows[0]["bytes_up"] + rows[1]["bytes_up"]
    assert capsys.readouterr().out.splitlines() == ["mine 4", f"1 2 {first}", f"2 2 {second}", "finished"]
    assert list(Path("runs/mine/tensorboard").glob("events.*"))


def test_the_legacy_snippets_run_as_they_stand(fresh_process):
    class FlowerClient(NumPyClient):
        def __init__(self, net, loader):
            self.net, self.loader = net, loader

        def fit(self, parameters, config):
            loss = my_training_loop(self.net, self.loader)
            return [value.numpy() for value in self.net.state_dict().values()], 20, {"train_loss": loss}

    samples = torch.utils.data.TensorDataset(torch.randn(20, 12), torch.randint(3, (20,)))
    names = {
        "Net": Net,
        "FlowerClient": FlowerClient,
        "load_data": lambda context: torch.utils.data.DataLoader(samples, batch_size=5),
        "server_fn": lambda context: ServerAppComponents(
            strategy=legacy.FedAvg(fraction_evaluate=0.0, evaluate_fn=lambda number, *_: seen.add(number)),
            config=ServerConfig(num_rounds=2),
        ),
    }
    seen: set[int] = set()
    server, client = dict(names), dict(names)
    exec(blocks("docs/drop-in.md", "# legacy server_app.py"), server)
    exec(blocks("docs/drop-in.md", "# legacy client_app.py"), client)
    run_in_process(server["app"], client["app"], num_supernodes=3)
    assert seen == {0, 1, 2}


def test_the_strategies_named_in_the_docs_compose(recwarn):
    source = blocks("docs/algorithms.md", "from flwr.serverapp.strategy import")
    from fedloru_flwr.strategies import FedLoRU

    exec(source, {"Net": Net, "FedLoRU": lambda model, **more: FedLoRU(model, rank=2, alpha=2, **more)})


def test_the_connection_of_the_readme_is_toml():
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tomllib.loads(block)["superlink"]["local-simulation"]["options"]["num-supernodes"] == 100


def test_the_snippet_of_the_rank_page_runs_as_it_stands():
    names = {"model": Net(), "inputs": torch.randn(20, 12), "labels": torch.randint(3, (20,))}
    exec(blocks("docs/rank.md", "from fedloru_flwr.rank import"), names)
    assert set(names["found"]) == {"", "hidden", "out"}


def test_the_conf_of_the_rank_page_is_valid_and_its_table_has_the_real_keys_and_defaults():
    page = (ROOT / "docs/rank.md").read_text()
    (conf,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert parse_rank_spec(tomllib.loads(conf), "page", "docs/rank.md").trainings
    defaults = {name_to_key(field.name): field.default for field in dataclasses.fields(Measure)}
    rows = re.findall(r"^\| `([a-z-]+)` \| ?`?([^|`]*?)`? ?\|", page, re.MULTILINE)
    assert [key for key, _ in rows] == list(defaults)
    for key, shown in rows[1:]:
        default = defaults[key]
        assert tomllib.loads(f"value = {shown}")["value"] == (list(default) if isinstance(default, tuple) else default)
