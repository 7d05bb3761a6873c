"""Classes as sentences: what is said to a network that knows texts in place of a class's bare name."""

from collections.abc import Sequence

from sightline.errors import printable
from sightline.schema import require

PHOTO = ("a photo of a {}.",)
"""What the networks of the paper are asked with (arXiv 2103.00020, section 3.1.4)."""

BARE = ("{}",)
"""The name alone, for networks that were taught by captions like it."""

MOST = 2**20
"""Most sentences at a time."""


def prompts(labels: Sequence[str], templates: Sequence[str]) -> tuple[list[str], list[int]]:
    """Every label in every template, and of which label each sentence is.

    A template has the mark {} where the label goes. Raises UserError for one without it, for labels that are empty or
    not distinct, and where there is none of either.
    """
    require(
        len(labels) > 0 and len(templates) > 0, "zero-shot answers need labels to choose from, and a prompt for them"
    )
    for template in templates:
        require("{}" in template, f"the prompt '{printable(template)}' has no {{}} where the label goes")
    for i, label in enumerate(labels):
        require(label.strip() != "", f"label {i + 1} of {len(labels)} is empty")
    twice = (
        next((label for i, label in enumerate(labels) if label in set(labels[:i])), None)
        if len(set(labels)) < len(labels)
        else None
    )
    require(twice is None, f"the label '{printable(twice)}' is there twice")
    require(len(labels) * len(templates) <= MOST, f"more than {MOST:,} prompts at a time")
    sentences = [template.replace("{}", label) for label in labels for template in templates]
    return sentences, [i for i in range(len(labels)) for _ in templates]
