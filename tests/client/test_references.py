from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpv.errors import InvalidReference
from tpv.references import Reference, check_alias, check_name

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
aliases = names.filter(lambda text: text not in ("latest", "newest") and not text.lstrip("v").isdigit())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mnli", Reference("default", "mnli")),
        ("lab/mnli", Reference("lab", "mnli")),
        ("mnli:3", Reference("default", "mnli", version=3)),
        ("lab/mnli@best", Reference("lab", "mnli", alias="best")),
        ("sha256:" + "a" * 64, Reference(fingerprint="sha256:" + "a" * 64)),
        ("0198c0de-0000-7000-8000-000000000000", Reference(id=uuid.UUID("0198c0de-0000-7000-8000-000000000000"))),
        ("a" * 36, Reference("default", "a" * 36)),
    ],
)
def test_each_form_of_a_reference_is_read(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "Mnli", "-mnli", "a b", "a/b/c", "mnli:", "mnli:0", "mnli:01", "mnli:v1", "mnli:-1", "mnli@",
        "mnli@latest", "mnli@newest", "mnli@v1", "mnli@12", "mnli:1@best", "mnli@best:1", "/mnli",
        "lab/", "../mnli", "mnli\n", "a" * 129, "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63,
        "urn:0198c0de000070008000000000000000",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(InvalidReference, match=r"is no |cannot be|is a number|a fingerprint is"):
        Reference.parse(text)


def test_a_name_of_36_characters_is_no_id_unless_it_has_the_form_of_one() -> None:
    name = "0198c0de0000-7000-8000-0000000000-00"
    assert Reference.parse(name) == Reference("default", name)


@given(names, names, st.none() | st.integers(1, 999_999_999) | aliases)
def test_what_is_written_is_read_again(namespace: str, name: str, selector: int | str | None) -> None:
    version, alias = (selector, None) if isinstance(selector, int) else (None, selector)
    reference = Reference(namespace, name, version=version, alias=alias)
    assert Reference.parse(str(reference)) == reference


def test_path_and_selector_are_the_parts_of_a_url() -> None:
    assert (Reference.parse("a@b").path, Reference.parse("a@b").selector) == ("default/a", "@b")
    assert Reference.parse("a:7").selector == "7"
    assert Reference.parse("a").selector is None


def test_names_and_aliases_are_checked() -> None:
    assert check_name("a.b-c_d") == "a.b-c_d"
    assert check_alias("best") == "best"
    with pytest.raises(InvalidReference, match="reads like a version"):
        check_alias("v2")
    with pytest.raises(InvalidReference, match="namespace"):
        check_name("A", "namespace")
