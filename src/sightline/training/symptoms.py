"""The rules by which a run's faults are known, each a function of the chart that gives a finding or None.

A rule speaks only where the figures leave no other reading: means over many batches, with their standard errors, are
held against what a network that knows nothing would get. docs/guides/doctor.md tells the rules with their reasons.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from statistics import fmean

from sightline.errors import printable
from sightline.training.chart import WINDOW, Chart, Finding, Labels, Mean
from sightline.training.schedule import UNMEASURED

NOTHING_LEARNED = 0.03
"""Share of what there is to learn (0 at chance, 1 for perfect answers) that counts as nothing."""

WORSE = 1.25
"""Loss, as a multiple of that of knowing nothing, from which a network is worse than none."""

FALLEN_BACK = 0.5
"""Share of what was learned that is lost in more than a bad stretch."""

LARGE_MOVE = 0.1
"""Share of its norm by which an update changes a kernel at too high a rate; 0.001 to 0.03 are usual."""

WHOLE_WAY = 1.0
"""Way, in lengths of the weights themselves, after which a network had every chance to learn."""

LAST_CHANCE, FAIR_WAY = 0.75, 0.25
"""Share of a run after which too little is left to learn much, where the weights have come so far."""

SHORT_WAY = 0.1
"""Way of a whole run after which weights are about where they began."""

SHORT_RUN = 50
"""Updates before which a run is too young for a verdict on its learning rate."""

FEW_PATCHES = 9
"""Patches of an image, 3×3, up to which there is next to nothing between which to attend."""

RARE = 0.1
"""Share of an even share of the images below which a class is rare."""

COMMON = 1.5
"""Multiple of an even share of the images from which one class may swallow the others."""

BY_HEART = 0.2
"""Share of the way from guessing to perfect answers at which training images are known by heart."""

RISING = 3
"""Evaluations in a row at which the held-out loss has to be higher: a single one can be bad luck, or a wild step."""

COMPARED = 2048
"""Images whose neighbours are looked at before the labels are judged."""

UNSAID = ("balanced", "commonest", "loss_error")
"""Figures of an evaluation for the doctor alone: mean recall of the classes, the largest share of the answers that one
class has, and the standard error of the loss."""

Rule = Callable[[Chart], Finding | None]


def constant_labels(chart: Chart) -> Finding | None:
    """All images of a part have the same label."""
    if chart.labels is None:
        return None
    for part, counts in (("training", chart.labels.train), ("held-out", chart.labels.val)):
        if sum(counts) and sum(count > 0 for count in counts) < 2:
            return Finding(
                "constant-labels",
                chart.step,
                "error",
                f"all {part} images have one and the same label, so that there is nothing to tell apart",
                "Check how the labels were written: class folders, or the column label of the table.",
            )
    return None


def class_imbalance(chart: Chart) -> Finding | None:
    """Some classes have next to no images."""
    if (labels := chart.labels) is None:
        return None
    even = sum(labels.train) / max(len(labels.train), 1)
    rare = [labels.names[i] for i, count in enumerate(labels.train) if 0 < count < RARE * even]
    if not rare:
        return None
    return Finding(
        "class-imbalance",
        chart.step,
        "note",
        f"{labels.share(labels.commonest):.0%} of the training images are {_class(labels)}, and {len(rare)} of "
        f"{len(labels.names)} classes have less than a tenth of an even share, such as '{printable(rare[0], 40)}'",
        "Judge by each class's recall, not by top-1; add images of the rare classes, or thin out the common ones.",
    )


def patch_too_large(chart: Chart, grid: tuple[int, int], size: tuple[int, int]) -> Finding | None:
    """An image makes so few patches that attention has nothing to do."""
    if grid[0] * grid[1] > FEW_PATCHES:
        return None
    return Finding(
        "patch-too-large",
        chart.step,
        "warning",
        f"an image of {size[0]}×{size[1]} pixels makes only {grid[0]}×{grid[1]} patches, and a Transformer learns from "
        "what patches have to do with each other",
        f"Use smaller patches (--patch-size {max(min(size) // 8, 1)}), or read larger images (--image-size "
        f"{2 * max(size)}).",
    )


def not_finite(chart: Chart) -> Finding | None:
    """An update was left out because its gradient was not finite."""
    if not chart.left_out:
        return None
    return Finding(
        "not-finite",
        chart.step,
        "error",
        "the gradient held NaN or infinity, and the update was left out; images of the batch: "
        + ", ".join(printable(name, 80) for name in chart.left_out),
        f"Look at those images; if others follow, use a smaller learning rate (--lr {chart.settings.lr / 10:.1g}), "
        "--clip-grad 1, or --precision fp32.",
    )


def divergence(chart: Chart) -> Finding | None:
    """The loss has risen: above that of knowing nothing, or back towards it."""
    if len(chart.losses) < WINDOW or (chart.labels is not None and not chart.learnable):
        return None
    (chance, floor), best = chart.scale, chart.best
    mean, last = Mean.of(chart.losses[-WINDOW:]), fmean(chart.losses[-WINDOW // 4 :])
    worse = min(mean.at_least(), last) > WORSE * chance
    if chart.labels is None:  # a decoder begins with answers worse than none: that is no rise
        worse = worse and best is not None and mean.at_least() > best.at_most()
    back = False
    if best is not None and chance - best.at_most() > 0.1 * (chance - floor):
        # Both are the extreme ones of many windows, so that their bounds have to lie apart, not only their difference.
        limit = best.at_most() + FALLEN_BACK * (chance - best.at_most())
        back = min(last, mean.value) > limit and mean.at_least() > best.at_most()
    if best is None or not (worse or back):
        return None
    settings = chart.settings
    was = f"after {best.value:.3f}; " if back else ""
    return Finding(
        "divergence",
        chart.step,
        "error",
        f"the loss has risen to {mean.value:.3f}, {was}that of knowing nothing is {chance:.3f}",
        f"Use a smaller learning rate (--lr {chart.fitting_rate} instead of {settings.lr:g}), {_gentler(chart)}"
        + ("." if settings.clip_grad else ", and clip gradients (--clip-grad 1)."),
    )


def rate_too_high(chart: Chart) -> Finding | None:
    """Updates replace a good part of the weights, and nothing is learned, or heads are put out of work by it."""
    large = next((heard for heard, move in chart.moves if move > LARGE_MOVE), None)
    if large is None or not chart.learnable or len(chart.losses) - large < WINDOW:
        return None
    nothing = chart.learned(WINDOW).value <= NOTHING_LEARNED
    still = {head[:2] for head in chart.still[0] & chart.still[1]}
    if not nothing and not still:
        return None
    what = f"the loss ({chart.recent:.3f}) is no better than that of knowing nothing ({chart.scale[0]:.3f})"
    if not nothing:
        what = f"{len(still)} attention heads have stopped attending"
    return Finding(
        "learning-rate-too-high",
        chart.step,
        "error",
        f"single updates changed the weights by more than {LARGE_MOVE:.0%} of their size, and {what}",
        f"Use a smaller learning rate: --lr {chart.fitting_rate} instead of {chart.settings.lr:g}.",
    )


def rate_too_low(chart: Chart) -> Finding | None:
    """The weights will stay about where they are, and nothing is learned."""
    if not _stuck(chart, 0.1) or chart.journey > SHORT_WAY:
        return None
    return Finding(
        "learning-rate-too-low",
        chart.step,
        "error",
        f"the loss ({chart.recent:.3f}) hardly moves, and in the whole run the weights will change by no more than "
        f"{chart.journey:.2g} of their size",
        f"Use a larger learning rate: --lr {chart.fitting_rate} instead of {chart.settings.lr:g}.",
    )


def loss_at_chance(chart: Chart) -> Finding | None:
    """The weights have come far, and nothing is learned."""
    late = _stuck(chart, LAST_CHANCE) and chart.travelled > FAIR_WAY
    if not late and not (_stuck(chart, 0.25) and chart.travelled > WHOLE_WAY):
        return None
    return Finding(
        "loss-at-chance",
        chart.step,
        "error",
        f"the loss ({chart.recent:.3f}) is that of answering without looking at the images ({chart.scale[0]:.3f})",
        ("Look whether the images show what the labels say (`sightline check`); then try" if chart.labels else "Try")
        + " another learning rate (--lr "
        f"{chart.settings.lr / 3:.1g}), a longer warm-up (--warmup 0.2), or less augmentation.",
    )


def _stuck(chart: Chart, share: float) -> bool:
    """Whether nothing is learned by that share of the run after its warm-up."""
    warmup = chart.settings.warmup
    if chart.plan.total == UNMEASURED or not chart.pace or chart.step < SHORT_RUN or not chart.learnable:
        return False
    if chart.progress < warmup + share * (1 - warmup) or len(chart.losses) % 5:
        return False
    learned = chart.learned(max(WINDOW, min(len(chart.losses) // 5, 10 * WINDOW)))
    return learned.value + 2 * learned.error < NOTHING_LEARNED


def unlike_labels(chart: Chart) -> Finding | None:
    """Nothing is learned, and pictures that look alike share a label as by chance."""
    images, same, expected, variance = chart.likeness
    if images < COMPARED or same - expected > 2 * sqrt(variance):
        return None
    return Finding(
        "shuffled-labels",
        chart.step,
        "error",
        f"nothing is learned, and of images that look most alike {same / images:.1%} share a label, where chance makes "
        f"it {expected / images:.1%}: the labels seem to belong to other images",
        "Compare some images with their labels, and check how the table or the folders were made.",
    )


def learned_by_heart(chart: Chart) -> Finding | None:
    """Training images are known, and held-out ones answered as by chance."""
    now, labels = chart.evaluations[-1], chart.labels
    if labels is None or "val_balanced" not in now or len(chart.accuracies) < WINDOW:
        return None
    guess, known = labels.share(labels.commonest), Mean.of(chart.accuracies[-WINDOW:])
    by_heart = (known.at_least() - guess) / max(1 - guess, 1e-9)
    counts = [count for count in labels.val if count]
    even, recall = 1 / len(counts), now["val_balanced"]
    error = sqrt(sum(max(recall * (1 - recall), even * (1 - even)) / count for count in counts)) / len(counts)
    carried_over = (recall + 3 * error - even) / max(1 - even, 1e-9)
    if by_heart < BY_HEART or carried_over > by_heart / 4:
        return None
    return Finding(
        "shuffled-labels",
        chart.step,
        "error",
        f"of the training images {known.value:.0%} are known, and held-out ones are answered as by chance (mean recall "
        f"{recall:.1%} of {len(counts)} classes): what was learned by heart says nothing about other images",
        "Check whether labels belong to their images, and whether both parts were labelled in the same way.",
    )


def over_fitting(chart: Chart) -> Finding | None:
    """The held-out loss rises while the training loss goes on falling."""
    labels, evaluations = chart.labels, chart.evaluations
    if labels is None or len(evaluations) <= RISING or "val_loss_error" not in evaluations[-1]:
        return None
    best = min(evaluations[:-RISING], key=lambda e: e["val_loss"])
    chance, images = labels.held_out_chance(), max(sum(labels.val), 1)
    if chance - best["val_loss"] < 3 * best["val_loss_error"]:
        return None  # nothing was learned that carries over
    luck = sqrt(best["val_top1"] * (1 - best["val_top1"]) / images)
    for now in evaluations[-RISING:]:
        error = sqrt(best["val_loss_error"] ** 2 + now["val_loss_error"] ** 2)
        risen = now["val_loss"] - best["val_loss"] > max(0.1 * chance, 3 * error)
        if not risen or now["val_top1"] > best["val_top1"] + luck or now["train"] > 0.9 * best["train"]:
            return None
    now, epochs = evaluations[-1], max(best["step"] / chart.steps_per_epoch, 1)
    return Finding(
        "over-fitting",
        chart.step,
        "warning",
        f"the held-out loss has risen from {best['val_loss']:.3f} at step {best['step']:.0f} to {now['val_loss']:.3f}, "
        f"while the training loss fell on from {best['train']:.3f} to {now['train']:.3f}",
        f"Train for less long (--epochs {epochs:.2g}, or --patience 5), vary the images more (--mixup 0.2, --smoothing "
        "0.1), or use a smaller network or more images.",
    )


def majority_collapse(chart: Chart) -> Finding | None:
    """Every answer is the commonest class."""
    labels, window = chart.labels, max(WINDOW, len(chart.losses) // 5)
    if labels is None or chart.progress < 0.5 or len(chart.evaluations) < 2 or not chart.learnable:
        return None
    if labels.share(labels.commonest) * len(labels.train) < COMMON or chart.learned(window).value > 0.1:
        return None
    if any(e.get("val_commonest", 0) < 1 for e in chart.evaluations[-2:]):
        return None
    return Finding(
        "majority-collapse",
        chart.step,
        "error",
        f"every held-out image is called {_class(labels)}, as are {labels.share(labels.commonest):.0%} of the training "
        f"images; top-1 of {chart.evaluations[-1]['val_top1']:.1%} hides that no other class is ever recognised",
        "Add images of the rare classes or thin out the common one, and train for longer (--epochs).",
    )


def collapsed_heads(chart: Chart) -> Finding | None:
    """Attention heads that see one token only."""
    one, more = "gives all its", "give all their"
    rest = " weight to one token, at every query of every image"
    return _heads(chart, "collapsed-heads", ("collapsed",), one + rest, more + rest)


def dead_heads(chart: Chart) -> Finding | None:
    """Attention heads that look nowhere or give nothing."""
    one, more = "looks nowhere in particular or gives nothing", "look nowhere in particular or give nothing"
    return _heads(chart, "dead-heads", ("uniform", "silent"), one, more)


def _heads(chart: Chart, kind: str, faults: tuple[str, ...], one: str, more: str) -> Finding | None:
    """Heads that were found so twice in a row; `one` says what a single one does, `more` what several do."""
    lasting = sorted(chart.still[0] & chart.still[1])
    heads = list(dict.fromkeys(f"{layer} head {number}" for layer, number, fault in lasting if fault in faults))
    if not heads:
        return None
    return Finding(
        kind,
        chart.step,
        "warning",
        (f"1 attention head {one}: " if len(heads) == 1 else f"{len(heads)} attention heads {more}: ")
        + ", ".join(heads[:6])
        + " …" * (len(heads) > 6),
        f"Use a smaller learning rate (--lr {chart.settings.lr / 3:.1g}), {_gentler(chart)}, fewer heads "
        "(--num-heads), or other weights to start from.",
    )


def _gentler(chart: Chart) -> str:
    return f"a longer warm-up (--warmup {min(2 * chart.settings.warmup or 0.1, 0.5):g})"


def _class(labels: Labels) -> str:
    return f"'{printable(labels.names[labels.commonest], 40)}'"


AT_ONCE: Mapping[str, Rule] = {"constant-labels": constant_labels, "class-imbalance": class_imbalance}
"""Rules for before the first step, by the kind of their finding."""

AT_BATCHES: Mapping[str, Rule] = {
    "not-finite": not_finite,
    "divergence": divergence,
    "learning-rate-too-high": rate_too_high,
    "learning-rate-too-low": rate_too_low,
    "loss-at-chance": loss_at_chance,
    "shuffled-labels": unlike_labels,
    "collapsed-heads": collapsed_heads,
    "dead-heads": dead_heads,
}
"""Rules for every recorded batch."""

AT_EVALUATIONS: Mapping[str, Rule] = {
    "shuffled-labels": learned_by_heart,
    "over-fitting": over_fitting,
    "majority-collapse": majority_collapse,
}
"""Rules for every evaluation."""
