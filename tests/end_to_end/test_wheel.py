"""The wheel, alone in a clean virtual environment."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built wheel."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_types_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedloru_flwr/py.typed" in names
    assert "fedloru_flwr/strategies/fedloru.py" in names
    assert {name.split("/")[0] for name in names} == {"fedloru_flwr", "fedloru_flwr-0.1.0.dist-info"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_alone_runs_a_job_in_a_clean_environment(wheel, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    work = tmp_path / "work"
    work.mkdir()
    where = subprocess.run(
        [str(python), "-c", "import fedloru_flwr; print(fedloru_flwr.__file__)"],
        cwd=work,
        env=clean,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert str(environment) in where
    settings = "num-server-rounds=2 num-clients=10 local-epochs=1 run-name=wheel"
    subprocess.run(
        [str(environment / "bin" / "fedloru"), "run", "--engine", "in-process", "-c", settings],
        cwd=work,
        env=clean,
        check=True,
        capture_output=True,
    )
    assert json.loads((work / "runs" / "wheel" / "summary.json").read_text())["status"] == "finished"
    subprocess.run(
        [str(environment / "bin" / "fedloru"), "run", "-c", settings.replace("wheel", "wheel-on-flower")],
        cwd=work,
        env=clean,
        check=True,
        capture_output=True,
    )
    assert json.loads((work / "runs" / "wheel-on-flower" / "summary.json").read_text())["status"] == "finished"
