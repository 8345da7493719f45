"""How the gain of mask classification depends on the number of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.ablations.findings import Finding, Judgement, judge
from benchmarks.ablations.groups import Group
from benchmarks.ablations.variants import PER_PIXEL_PLUS, Settings, Variant
from fastmask.data.open import COMPOSED_ICONS, number_of_icons

CLAIM = Finding(
    "structures",
    "(d) above (b), by more with more classes",
    "+0.0 on Cityscapes (19 classes), +2.6 on ADE20K (150), table 2",
    Variant("", 0, 0),
    Variant("", 0, 0),
    "mIoU",
)


@dataclass(frozen=True)
class Growth:
    """(d) minus (b) in mIoU for several numbers of classes of icons, with settings that are otherwise the same: as many
    steps, or as many steps for each class of things, so that a class is seen as often.

    Args:
        title: the device and the steps in words.
        classes: ascending numbers of classes, at least two.
        gains: the judgement for each of them.
    """

    title: str
    classes: tuple[int, ...]
    gains: tuple[Judgement, ...]

    @property
    def growth(self) -> Judgement:
        """The gain with the most classes minus that with the fewest, paired by seed."""
        least, most = self.gains[0].differences, self.gains[-1].differences
        return Judgement(CLAIM, tuple(b - a for a, b in zip(least, most, strict=False)))


def growths(groups: Sequence[Group]) -> Iterator[Growth]:
    """Those that the groups of a result file show."""
    found: dict[tuple[str, Settings, float, str], dict[int, Judgement]] = {}
    for group in groups:
        settings = group.settings
        if not settings.data.startswith(COMPOSED_ICONS):
            continue
        base, classes = group.base, number_of_icons(settings.data)
        gain = judge(replace(CLAIM, better=base, worse=Variant(PER_PIXEL_PLUS, base.queries, base.layers)), group.rows)
        if gain.differences:
            others = replace(settings, data="", steps=0, tuning_steps=0)
            for steps, unit in ((settings.steps, "steps"), (settings.steps / classes, "steps per class of things")):
                found.setdefault((group.rows[0]["device"], others, steps, unit), {})[classes] = gain
    for (device, _, steps, unit), gains in found.items():
        if len(gains) > 1:
            classes = tuple(sorted(gains))
            title = f"growth with the number of classes, {device}, {steps:g} {unit}"
            yield Growth(title, classes, tuple(gains[number] for number in classes))
