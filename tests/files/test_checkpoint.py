"""A checkpoint on disk: an index of shards is read within its folder, or refused."""

import json

from hypothesis import given
from hypothesis import strategies as st

from paramlora import files
from tests.files.fuzzed import FUZZ, LINEAR, indexed, json_values, tried


@given(
    index=json_values | st.fixed_dictionaries({"weight_map": json_values, "metadata": json_values})
)
@FUZZ
def test_any_index_is_read_or_refused(index, tmp_path):
    place = tmp_path / "base"
    if not place.exists():
        indexed(place)
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    tried(lambda: files.merge(place, [LINEAR], tmp_path / "out", dry_run=True))
