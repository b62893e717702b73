import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_page_shows_a_simulation_and_a_deployment() -> None:
    assert ["load_client" in snippet for snippet in SNIPPETS] == [True, False]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_of_the_page_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


@pytest.mark.parametrize("key", re.findall(r"`([a-z]+(?:-[a-z]+)+)`", PAGE.read_text(encoding="utf-8")))
def test_every_key_of_the_page_is_a_setting(key: str) -> None:
    from fedloru_flwr.config import RunConfig

    assert key in RunConfig().as_mapping()
