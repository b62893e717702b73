import pytest


@pytest.fixture(autouse=True)
def surroundings(fresh_process, quick_books):
    """What every test here has."""
