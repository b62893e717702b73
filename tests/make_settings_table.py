"""Writes docs/settings.md from the declarations in config.py: ``python tests/make_settings_table.py``."""

import dataclasses
from pathlib import Path

from fedloru_flwr.config import RunConfig, name_to_key

PATH = Path(__file__).parent.parent / "docs" / "settings.md"


def table() -> str:
    lines = [
        "# Settings",
        "",
        "One flat table of keys, the same in `[tool.flwr.app.config]`, in a CONF.toml and behind `fedloru run -c`.",
        "An unknown key or an impossible value is refused before any client starts.",
        "",
        "| Key | Default | Meaning |",
        "|---|---|---|",
    ]
    for setting in dataclasses.fields(RunConfig):
        default = setting.default
        shown = str(default).lower() if isinstance(default, bool) else f'"{default}"' if default == "" else str(default)
        meaning = setting.metadata["help"].replace("|", "\\|")
        if choices := setting.metadata["choices"]:
            named = ", ".join(choice or '""' for choice in choices)
            meaning += f" ({named})"
        lines.append(f"| `{name_to_key(setting.name)}` | `{shown}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(table(), encoding="utf-8")
