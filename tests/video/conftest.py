import pytest


@pytest.fixture(scope="session")
def task():
    return "video"
