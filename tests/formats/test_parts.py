"""The parts that a table knows in a model's weights, fused there or apart."""

from paramlora.formats.parts import STACKS, WITH, instance, last, parts_of

APART = {f"model.layers.{n}.self_attn.{x}_proj": (4, 8) for n in "01" for x in "qkv"}
FUSED = {f"model.layers.{n}.self_attn.qkv_proj": (12, 8) for n in "01"}


def test_the_same_rows_have_one_name_fused_or_apart():
    apart, fused = parts_of(APART), parts_of(FUSED)
    assert set(apart) == set(fused) == set(APART)
    assert all(held.path == name for name, held in apart.items())
    for name, held in fused.items():
        assert held.path == f"{name.rpartition('.')[0]}.qkv_proj"
        (rows,) = held.rows  # in the order in which they lie
        assert [part.name.rpartition(".")[2] for part in rows] == ["q_proj", "k_proj", "v_proj"]


def test_a_weight_that_the_model_lacks_is_made_of_all_of_its_parts_or_not_at_all():
    path = ("model", "layers", "0", "self_attn", "qkv_proj")
    (row,) = [r for r in WITH["**.self_attn.q_proj", None] if r.name.match(path)]
    before = path[: row.name.match(path)[0]]
    (made,) = instance(row, before, (), parts_of(APART))
    assert [part.name for part in made] == list(APART)[:3]
    fewer = {name: shape for name, shape in APART.items() if "0.self_attn.k" not in name}
    assert instance(row, before, (), parts_of(fewer)) is None


def test_a_stack_has_the_parts_of_each_of_its_matrices():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert "gate_up_proj" in STACKS
    found = parts_of({name: (3, 12, 8)})
    assert {held.path for held in found.values()} == {name}
    single = {f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up")}
    assert set(found) == single
    for shape in ((12, 8), (0, 12, 8), (1 << 15, 12, 8)):  # no stack, an empty one, a claim
        assert not parts_of({name: shape})


def test_a_number_at_the_end_is_any_number():
    assert last(("a", "0")) == "*" and last(("a", "b")) == "b"
