"""The Flower ServerApp: reads the settings and runs the job they describe."""

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedloru_flwr.config import RunConfig
from fedloru_flwr.engines.hosted import hosted
from fedloru_flwr.job import Job

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job of the run config."""
    config = RunConfig.from_mapping(context.run_config)
    torch.set_num_threads(config.threads)
    job = Job.prepare(config)
    job.run(hosted(grid, config.num_clients, config.clients_per_batch))
