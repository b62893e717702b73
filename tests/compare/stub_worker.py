"""A worker whose runs are made up: quick, resumable from every third round, and the same whenever they are made."""

import hashlib
import json
import os
import time
from pathlib import Path

from fedloru_flwr.compare import worker


def accuracy(settings, number):
    told = json.dumps([settings["algorithm"], settings["learning-rate"], settings["seed"], number])
    return int(hashlib.sha256(told.encode()).hexdigest()[:4], 16) / 65535


def run(task):
    settings = task["settings"]
    path = Path(settings["output-dir"]) / settings["run-name"]
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({"config": settings}))
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = whole[: len(whole) // 3 * 3]
    metrics.write_text("".join(kept))
    total = settings["num-server-rounds"]
    for number in range(len(kept), total + 1):
        time.sleep(0.015)
        row = {"round": number, "accuracy": accuracy(settings, number), "bytes_up": 1000, "bytes_down": 2000}
        with metrics.open("a") as file:
            file.write(json.dumps({**row, "seconds": time.time() % 1}) + "\n")
        if settings["learning-rate"] == 13.0 and number >= 2:
            (path / "summary.json").write_text(json.dumps({"status": "failed", "rounds": total}))
            raise RuntimeError(f"out of chalk in round {number}\nand of sponges")
        if settings["learning-rate"] == 14.0:
            os._exit(9)
    (path / "summary.json").write_text(json.dumps({"status": "finished", "rounds": total}))
    return {}


def partition(task):
    return {"counts": [[3, 0, 1]] * min(task["settings"]["num-clients"], task["most"])}


def check(task):
    if task["settings"]["rank"] == 99:
        raise ValueError("rank = 99 is too much for this stub")
    return {}


def learned(task):
    (Path(task["directory"]) / "rank.csv").write_text("kind,layer,total_stable_rank\nlearned,fc,1.5\n")
    return {}


if __name__ == "__main__":
    worker.TASKS.update(run=run, partition=partition, check=check, learned=learned)
    worker.main()
