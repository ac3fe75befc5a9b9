"""How much smaller or faster: never a factor below one."""

import pytest

from fastdistil.wording import gain


@pytest.mark.parametrize(
    ("ratio", "told"),
    [(8.44, "8.4× faster"), (1.0, "1.0× faster"), (0.5, "2.0× slower"), (0.2, "5.0× slower")],
)
def test_a_ratio_below_one_is_a_loss(ratio: float, told: str) -> None:
    assert gain(ratio, "faster", "slower") == told
