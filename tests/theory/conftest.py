"""What tests of coefficients by layer share: checks of a value and of its slope."""

import numpy as np
import pytest


@pytest.fixture
def check_convex():
    """Checks that a value of coefficients (2, 3) is jointly convex."""

    def check(of):
        draw = np.random.default_rng(1)
        for _ in range(300):
            one, two = draw.exponential(0.5, (2, 2, 3))
            middle = of.value((one + two) / 2)
            assert middle <= (of.value(one) + of.value(two)) / 2 + 1e-9

    return check


@pytest.fixture
def check_slope():
    """Checks that the slope of coefficients (2, 3) is that of differences of the value."""

    def check(of):
        at, step = np.array([[0.3, 0.1, 0.9], [0.2, 0.4, 0.5]]), 1e-6
        for place in np.ndindex(2, 3):
            more, less = at.copy(), at.copy()
            more[place] += step
            less[place] -= step
            expected = (of.value(more) - of.value(less)) / (2 * step)
            assert of.slope(at)[place] == pytest.approx(expected, rel=1e-4)

    return check
