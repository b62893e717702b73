import pytest


@pytest.fixture(autouse=True)
def surroundings(fresh_process):
    """What every test here has."""
