"""How much memory a test of hostile files may take."""

import pytest

from tests.files import resident


@pytest.fixture
def bounded():
    """A test may not need more than 400 MB beyond what torch itself takes: a fraction of the
    1 GiB that a refusal may, with room for what is imported when it is first needed."""
    resident.restart()
    before = resident.peak() if resident.COUNTED else 0
    yield
    assert not resident.COUNTED or resident.peak() - before < 400
