"""Dynamo's public API and this library's in its place: every class, member, argument and enumerated value is there."""

import enum
import inspect

import dynamo.nixl_connect as theirs
import pytest

from nixl_async.integrations import dynamo_connect as ours

CLASSES = [
    name
    for name, value in vars(theirs).items()
    if inspect.isclass(value) and value.__module__ == theirs.__name__ and not name.startswith("_")
]


def test_the_classes_are_found():
    assert len(CLASSES) == 17


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_all_its_members(name):
    one, other = getattr(theirs, name), getattr(ours, name)
    members = {m for m in dir(one) if not m.startswith("_") and not hasattr(object, m)}
    assert members <= set(dir(other)), members - set(dir(other))
    for member in members:
        ((_, his), (_, mine)) = ((member, inspect.getattr_static(c, member)) for c in (one, other))
        if inspect.isfunction(his):
            assert inspect.iscoroutinefunction(his) == inspect.iscoroutinefunction(mine), member
            accepts(getattr(one, member), getattr(other, member))
    if issubclass(one, enum.Enum):
        assert {m.name: (m.value, str(m)) for m in one} == {m.name: (m.value, str(m)) for m in other}
    elif not inspect.isabstract(one):
        accepts(one.__init__, other.__init__)
    assert {b.__name__ for b in one.__mro__ if b.__module__ == theirs.__name__} <= {b.__name__ for b in other.__mro__}


def accepts(his, mine):
    """Tell whether `mine` can be called in every way that `his` can."""
    wanted, given = inspect.signature(his).parameters, inspect.signature(mine).parameters
    assert list(wanted) == list(given)[: len(wanted)]
    for name, parameter in wanted.items():
        assert given[name].kind == parameter.kind, name
        assert (given[name].default is inspect.Parameter.empty) <= (parameter.default is inspect.Parameter.empty), name
    for name in list(given)[len(wanted) :]:
        assert given[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("model", ["RdmaMetadata", "SerializedDescriptor"])
def test_each_reads_what_the_other_wrote(model):
    fields = {"device": "cuda:1", "ptr": 4096, "size": 10}
    if model == "RdmaMetadata":
        fields = {"descriptors": [fields], "nixl_metadata": "b64:eA==", "notification_key": "a key", "operation_kind": 2}
    for writer, reader in ((ours, theirs), (theirs, ours)):
        written = getattr(writer, model)(**fields)
        read = getattr(reader, model).model_validate_json(written.model_dump_json())
        assert read.model_dump() == fields
        with pytest.raises(ValueError, match="frozen"):
            read.device = "cpu" if model == "SerializedDescriptor" else None
