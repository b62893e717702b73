"""`fedloru plan`: a plan shown as tables or as JSON, and drawn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloru_flwr.config import ConfigError
from fedloru_flwr.plan.picture import check_picture, draw_plan
from fedloru_flwr.plan.planning import Bandwidth, Plan, plan
from fedloru_flwr.plan.report import as_tables
from fedloru_flwr.suggest import did_you_mean

FORMATS = ("table", "json")


def show_plan(
    conf: Path | None,
    config: Mapping[str, object],
    *,
    output: str,
    picture: Path | None,
    bandwidths: Sequence[str],
    console: Console | None = None,
    **more: Any,
) -> Plan:
    """Make a plan and print it.

    Args:
        conf: a CONF.toml.
        config: settings that go over the file's.
        output: ``table`` or ``json``.
        picture: a file to draw it into, or None.
        bandwidths: as `Bandwidth.parse` reads them.
        console: where to; default standard output.
        more: see `plan`.

    Raises:
        ValueError: a setting or an argument makes no sense; nothing was written.
    """
    if output not in FORMATS:
        raise ConfigError(f"format = {output!r} is not one of {', '.join(FORMATS)}{did_you_mean(output, FORMATS)}")
    if picture is not None:
        check_picture(picture)
    found = plan(conf, config, bandwidths=[Bandwidth.parse(text) for text in bandwidths], **more)
    console = console or Console()
    if output == "json":
        console.file.write(f"{json.dumps(found.as_json(), indent=1)}\n")
    else:
        console.print(as_tables(found), highlight=False, soft_wrap=False)
    if picture is not None:
        draw_plan(found, picture)
    return found
