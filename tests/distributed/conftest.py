"""The processes that the tests of this folder share."""

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def processes():
    pool = Processes()
    yield pool
    pool.end()
