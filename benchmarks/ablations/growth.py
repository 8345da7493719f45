"""How the gain of mask classification depends on the number of classes, and on the length of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.ablations.findings import Finding, Judgement, judge
from benchmarks.ablations.groups import Group
from benchmarks.ablations.variants import PER_PIXEL_PLUS, Variant
from fastmask.data.open import COMPOSED_ICONS, number_of_icons

CLASSES, STEPS = "classes of things", "optimizer steps"
PAPERS = {
    CLASSES: "+0.0 on Cityscapes (19 classes), +2.6 on ADE20K (150), table 2",
    STEPS: "+2.6 on ADE20K after 160,000 steps of 16 images, table 2",
}


@dataclass(frozen=True)
class Growth:
    """(d) minus (b) in mIoU for several numbers of classes of icons, with settings that are otherwise the same: as many
    steps, or as many steps for each class of things, so that a class is seen as often; or for several numbers of steps.

    Args:
        title: the data or the steps in words, and the device.
        quantity: what grows: ``CLASSES`` or ``STEPS``.
        groups: the rows by ascending numbers of these, at least two.
    """

    title: str
    quantity: str
    groups: Mapping[int, Group]

    @property
    def gains(self) -> dict[int, Judgement]:
        return {number: gain(group, self.quantity) for number, group in self.groups.items()}

    @property
    def growth(self) -> Judgement:
        """The gain with the largest number minus that with the smallest, paired by seed."""
        least, *_, most = self.gains.values()
        differences = tuple(b - a for a, b in zip(least.differences, most.differences, strict=False))
        return Judgement(most.finding, differences)


def gain(group: Group, quantity: str = CLASSES) -> Judgement:
    """Of (d) over (b)."""
    better, worse = group.base, per_pixel_plus(group)
    return judge(Finding("structures", "(d) above (b)", PAPERS[quantity], better, worse, "mIoU"), group.rows)


def per_pixel_plus(group: Group) -> Variant:
    """Structure (b) with as many queries and layers as the group's structure (d)."""
    return Variant(PER_PIXEL_PLUS, group.base.queries, group.base.layers)


def growths(groups: Sequence[Group]) -> Iterator[Growth]:
    """Those that the groups of a result file show."""
    found: dict[tuple[Any, ...], dict[int, Group]] = {}
    for group in groups:
        if group.is_sound or not gain(group).differences:
            continue
        settings, device = group.settings, group.rows[0]["device"]
        others = replace(settings, steps=0, tuning_steps=0)
        found.setdefault((f"{group.title}, training of several lengths", STEPS, others), {})[settings.steps] = group
        if settings.data.startswith(COMPOSED_ICONS):
            classes = number_of_icons(settings.data)
            others = replace(others, data="")
            for steps, unit in ((settings.steps, "steps"), (settings.steps / classes, "steps per class of things")):
                title = f"growth with the number of classes, {device}, {steps:g} {unit}"
                found.setdefault((title, CLASSES, others), {})[classes] = group
    for (title, quantity, _), by_number in found.items():
        if len(by_number) > 1:
            yield Growth(title, quantity, dict(sorted(by_number.items())))
