"""What all scenarios share."""

from collections.abc import Iterator

import pytest

from tests.faults import runs


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    runs.clean_up()
