"""Is it working? What a run's rows say of it, in one sentence."""

WRONG_SIGN, LOW_ESS, DRIFT, VARIETY, WORSE = -0.2, 0.1, 1.5, 0.7, 1.3


def warning(rows):
    """rows of log.csv, dictionaries -> the one warning that fits the last of them best, or "" for a
    healthy run. Rows count once the generator moves."""
    moved = [row for row in rows if "ess" in row]
    if not moved:
        return ""
    row, variance = moved[-1], max(row["variance"] for row in moved)
    best = min(row["to_data"] for row in moved)
    if row["log_r"] < WRONG_SIGN:           # its mean under q is KL(q || p), which is not below 0
        return (f"the mean of log r is {row['log_r']:.1f}, and no ratio q/p has one below 0: r is "
                "upside down, or the classifier does not learn")
    if row["ess"] < LOW_ESS:
        return (f"the effective sample size is {row['ess']:.0%} of the batch: few samples make the "
                "update; try --ess 0.9 or a smaller --lam")
    if row["log_r"] > DRIFT:
        return (f"log r drifts, its mean is {row['log_r']:.1f}: the fake network does not keep up; "
                "try a higher --lr-f or a lower --lr-g")
    if row["variance"] < VARIETY * variance:
        return (f"the samples lose variety: their variance fell from {variance:.2f} to "
                f"{row['variance']:.2f} of the reference's; try a lower --lr-g or --h be")
    if row["to_data"] > WORSE * best:
        return (f"the distance rises, from {best:.3g} to {row['to_data']:.3g}: the rates are too "
                "high, or the noise levels too low; try a lower --lr-g or a higher --t-min")
    return ""
