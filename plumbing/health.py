"""Is it working? What a run's rows say of it, in one sentence."""

LOW_ESS, DRIFT, LESS_VARIANCE, WORSE = 0.1, 1.5, 0.7, 1.3       # see results.md, "Is it working?"


def warning(rows):
    """rows of log.csv, dictionaries -> the one warning that fits best, or "" for a healthy run. A
    row is judged once the generator moves."""
    moved = [row for row in rows if "ess" in row]
    if not moved:
        return ""
    row, best = moved[-1], min(row["to_data"] for row in rows)
    if row["ess"] < LOW_ESS:
        return (f"the effective sample size is {row['ess']:.0%} of the batch: a few samples make "
                "the update; try --ess 0.9 or a smaller --lam")
    if abs(row["log_r"]) > DRIFT:
        return (f"log r drifts, its mean is {row['log_r']:.1f}: the fake network does not follow "
                "the generator; try a higher --lr-f or a lower --lr-g")
    if row["variance"] < LESS_VARIANCE * rows[0]["variance"]:
        return ""
    if row["to_data"] > WORSE * best:
        return ""
    return ""
