"""How a metric is shown, and which direction is better; the tasks say it of theirs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric's name as prose, its unit, whether higher is better, and its digits."""

    label: str
    unit: str
    higher_is_better: bool | None  # `None` for neither
    digits: int = 1  # behind the point, of one value; one more of a mean over seeds

    @property
    def title(self) -> str:
        arrow = {True: "↑", False: "↓", None: ""}[self.higher_is_better]
        label = f"{self.label}, {self.unit}" if self.unit else self.label
        return f"{label} {arrow}".strip()
