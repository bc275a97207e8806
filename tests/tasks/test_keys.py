from hypothesis import given
from hypothesis import strategies as st

from tasks.keys import artifact_key, canonical
from tasks.sources import Source
from tasks.stages import PREPARE_DATA, QUANTIZE_MODEL, Order

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), values, max_size=4), st.randoms())
def test_the_order_of_keys_does_not_matter(section: dict[str, object], random: object) -> None:
    names = list(section)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert canonical({name: section[name] for name in names}) == canonical(section)


def test_everything_that_matters_changes_the_key() -> None:
    base = {"stage": "s", "version": 1, "section": {"bits": 4}, "seed": 0, "inputs": {"data": "a"}}
    changes = [
        {"stage": "t"},
        {"version": 2},
        {"section": {"bits": 3}},
        {"seed": 1},
        {"inputs": {"data": "b"}},
        {"inputs": {"base": "a"}},
    ]
    keys = {artifact_key(**(base | change)) for change in [{}, *changes]}  # type: ignore[arg-type]
    assert len(keys) == len(changes) + 1


def test_what_is_not_keyed_does_not_change_the_key() -> None:
    order = Order(title="q", stage=QUANTIZE_MODEL, section={"bits": 4}, seed=0)
    renamed = order.model_copy(update={"title": "x", "unkeyed": {"checkpoint_every_steps": 5}})
    assert renamed.key == order.key


def test_a_source_counts_by_what_is_there_not_by_name() -> None:
    def key(reference: str, identity: str) -> str:
        source = Source(reference, "local", identity)
        return Order(
            title="d", stage=PREPARE_DATA, section={}, seed=0, sources={"train": source}
        ).key

    assert key("a.txt", "1") == key("b.txt", "1")
    assert key("a.txt", "1") != key("a.txt", "2")


def test_an_order_survives_json() -> None:
    source = Source("builtin:x", "builtin", "1")
    order = Order(title="d", stage=PREPARE_DATA, section={"a": [1]}, seed=3, sources={"s": source})
    assert Order.model_validate_json(order.model_dump_json()) == order
    assert Order.model_validate_json(order.model_dump_json()).key == order.key
