"""This file is Student's quantile, which intervals of few values take."""


def student_quantile(level: float, freedom: int) -> float:
    """Return how many estimated standard deviations to either side hold that share of a mean.

    Args:
        level: the share, in (0, 1).
        freedom: degrees of freedom of the estimated deviation, at least 1.

    Source: Student 1908, doi:10.1093/biomet/6.1.1.
    """
    # Here, because importing it takes longer than most that needs no interval.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1.0 + level) / 2.0))
