"""Entries of a configuration, right ones and nearly right ones, and any JSON."""

from hypothesis import settings
from hypothesis import strategies as st

from paramlora.config import ALLOWED

COMMON = settings(max_examples=150, deadline=None, database=None)
FLAGS = st.sampled_from([0, 1, False, True])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(ALLOWED), inner, max_size=3)
    ),
    max_leaves=6,
)
NEARLY = st.fixed_dictionaries(
    {"r": st.integers(-1, 3) | JSON}, optional={key: JSON for key in ALLOWED if key != "r"}
)
