"""How many examples a property is tried on, and what several rooms draw them from."""

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from sightline.errors import UserError


def examples(count: int) -> settings:
    """So many examples where others have 100; in proportion where the profile asks for more."""
    return settings(max_examples=max(1, count * settings().max_examples // 100))


def tried(work: Callable[[], Any]) -> tuple[Any, str]:
    """What `work` gives, or None and what it is refused with; no other exception is accepted."""
    try:
        return work(), ""
    except UserError as fault:
        return None, str(fault)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 1e308])  # JSON has no limit on its numbers
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
"""Any value that a JSON file can hold."""


@st.composite
def altered(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with one part of it, at any depth, replaced, left out or added."""
    if isinstance(whole, (dict, list)) and whole and draw(st.integers(0, 4)):
        changed = dict(whole) if isinstance(whole, dict) else list(whole)
        place = draw(st.sampled_from(sorted(whole) if isinstance(whole, dict) else range(len(whole))))
        if draw(st.integers(0, 9)):
            changed[place] = draw(altered(whole[place]))
        else:
            del changed[place]
        return changed
    if isinstance(whole, dict) and draw(st.booleans()):
        return {**whole, draw(st.text(max_size=8)): draw(JSON)}
    return draw(JSON)
