"""A run that groups watches itself: how its groups change, and what looks wrong with them or with the scaling terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpv_worker.methods.protocol import Report

WINDOW = 100  #: steps that are looked at together; half of the steps in shorter runs

#: Changes in 100 steps. With more, a group lasts shorter than the 10 steps that AdamW's first moment (beta 0.9)
#: remembers, so scaling terms are moved by gradients of groups that are gone. Only the second half of a run is judged:
#: in the first one many changes are usual (section 4.4 of the DTVG paper).
FLAPPING = 10

#: Mean |alpha|. It begins at one; below this, less than a tenth of the vector is left, and hardly any of its gradient.
COLLAPSED = 0.1


class Watch:
    """Follows the groups of one run, step by step; each warning is given once.

    `facts` has `group_changes_per_100_steps` of the whole run (the order in a group does not count), `group_jaccard`,
    the mean share of sources that the groups before and after a change have in common, and the warnings.
    """

    def __init__(self, steps: int, names: Sequence[str], largest: int) -> None:
        """`steps` of the run at most, `names` of the sources, `largest` possible group."""
        self.steps, self.names, self.largest = steps, names, largest
        self.window = max(1, min(WINDOW, steps // 2))
        self.report: Report = lambda event: None
        self.step = 0
        self.members: tuple[int, ...] = ()
        self.changes: list[int] = []  # steps
        self.jaccards: list[float] = []
        self.small = 0  # steps in a row with a group as small as it is now
        self.told: set[str] = set()
        self.warnings: list[str] = []
        self.facts: dict[str, Any] = {"warnings": self.warnings}

    def saw(self, members: tuple[int, ...]) -> None:
        """The group of the next step."""
        self.step += 1
        same_size = len(members) == len(self.members)
        if self.step > 1 and members != self.members:
            before, after = set(self.members), set(members)
            if before != after:
                self.changes.append(self.step)
                self.jaccards.append(len(before & after) / len(before | after))
                self._judge_changes()
        self.members = members
        self.small = self.small + 1 if same_size else 1
        if len(members) < min(2, self.largest) and self.small == self.window:
            self._judge_size()
        self._count()

    def sizes(self, sizes: Iterable[tuple[str, float]]) -> None:
        """Mean |alpha| of the target and of the sources in the group, by their names."""
        low = {name: size for name, size in sizes if size < COLLAPSED and name not in self.told}
        self.told |= low.keys()
        if low:
            figures = ", ".join(f"{name} ({size:.2g})" for name, size in low.items())
            self._warn(f"scaling terms are near 0, so that their vectors hardly count: {figures}; try lower rates")

    def state(self) -> dict[str, Any]:
        """All that has been seen so far; JSON."""
        return {
            "step": self.step,
            "members": self.members,
            "changes": self.changes,
            "jaccards": self.jaccards,
            "small": self.small,
            "told": sorted(self.told),
            "warnings": self.warnings,
        }

    def resume(self, state: Mapping[str, Any], report: Report) -> None:
        """Goes on from such a state."""
        self.report = report
        self.step, self.members, self.small = state["step"], tuple(state["members"]), state["small"]
        self.changes, self.jaccards, self.told = [*state["changes"]], [*state["jaccards"]], {*state["told"]}
        self.warnings[:] = state["warnings"]
        self._count()

    def _count(self) -> None:
        self.facts["group_changes_per_100_steps"] = 100 * len(self.changes) / self.step
        self.facts["group_jaccard"] = sum(self.jaccards) / len(self.jaccards) if self.jaccards else 1.0

    def _judge_changes(self) -> None:
        recent = sum(step > self.step - self.window for step in self.changes[-self.window :])
        often = recent * 100 > FLAPPING * self.window
        if often and 2 * self.step > self.steps and "flapping" not in self.told:
            self.told.add("flapping")
            self._warn(
                f"the group has changed {recent} times in {self.window} steps and does not settle; try lower rates or "
                "a larger regroup_every"
            )

    def _judge_size(self) -> None:
        kind = "single" if self.members else "empty"
        if kind in self.told:
            return
        self.told.add(kind)
        if self.members:
            name = self.names[self.members[0]]
            self._warn(f"the group has been {name} alone for {self.window} steps: no other source goes with it")
        else:
            self._warn(f"the group has been empty for {self.window} steps: no source is similar to the target")

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.report({"type": "warning", "step": self.step, "message": message})
