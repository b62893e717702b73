"""What a client does about its process's memory."""

import ctypes

import pytest

from fedloru_flwr.clients import memory


class Library:
    """The C library, whose calls are noted."""

    def __init__(self):
        self.calls = []

    def mallopt(self, option, value):
        """Note it."""
        self.calls.append((option, value))
        return 1


@pytest.fixture
def library(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.keep_freed_memory.cache_clear()
    yield library
    memory.keep_freed_memory.cache_clear()


def test_freed_memory_is_kept_and_that_is_told_once(library):
    memory.keep_freed_memory()
    memory.keep_freed_memory()
    assert library.calls == [(-3, 32 << 20), (-1, 256 << 20)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_settings_are_left_alone(library, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    memory.keep_freed_memory()
    assert library.calls == []


def test_another_c_library_is_left_alone(library, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
