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
    """(d) minus (b) in mIoU for several numbers of classes of icons, with settings that are otherwise the same.

    Args:
        title: the device and the settings in words.
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
    found: dict[tuple[str, Settings], dict[int, Judgement]] = {}
    for group in groups:
        if not group.settings.data.startswith(COMPOSED_ICONS):
            continue
        base = group.base
        gain = judge(replace(CLAIM, better=base, worse=Variant(PER_PIXEL_PLUS, base.queries, base.layers)), group.rows)
        if gain.differences:
            device = group.rows[0]["device"]
            found.setdefault((device, replace(group.settings, data="")), {})[number_of_icons(group.settings.data)] = (
                gain
            )
    for (device, settings), gains in found.items():
        if len(gains) > 1:
            classes = tuple(sorted(gains))
            title = f"growth with the number of classes, {device}, {settings.steps} steps"
            yield Growth(title, classes, tuple(gains[number] for number in classes))
