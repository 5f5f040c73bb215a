"""Is it working? What a run's rows say of it, in one sentence. The bounds lie between the healthy
and the sick runs of results/health; a network much larger than these may need others."""

STALE, WRONG_SIGN, LOW_ESS, DRIFT, VARIETY, WORSE = 0.6, -0.05, 0.1, 1.5, 0.7, 1.3


def warning(rows):
    """rows of log.csv, dictionaries -> the one warning that fits the last of them best, or "" for a
    healthy run. Rows count once the generator moves."""
    moved = [row for row in rows if "ess" in row]
    if not moved:
        return ""
    row, start, variance = moved[-1], rows[0]["to_data"], max(row["variance"] for row in moved)
    best, worst = (f(row["to_data"] for row in moved) for f in (min, max))
    if row["loss_score"] > STALE:           # healthy: about the teacher's own loss on images
        return (f"the fake score's loss is {row['loss_score']:.1f}: it does not follow the "
                "student; try a higher --lr-f or a lower --lr-g")
    if row["log_r"] < WRONG_SIGN:           # its mean under q is KL(q || p), which is not below 0
        return (f"the mean of log r is {row['log_r']:.2f}, and no ratio q/p has one below 0: r is "
                "upside down, or the classifier does not learn")
    drifts = row["log_r"] > DRIFT
    if row["ess"] < (0.5 if drifts else LOW_ESS):
        return (f"the effective sample size is {row['ess']:.0%} of the batch: few samples make the "
                "update; try --ess 0.9 or a smaller --lam")
    if drifts:
        return (f"the mean of log r is {row['log_r']:.1f}: the classifier tells the student's "
                "samples from the teacher's; try a higher --t-max, a lower --lr-g, or detach x_t")
    if worst > start and row["to_data"] > start / 2:
        return (f"the student went farther from the data than it began, to {worst:.3g} from "
                f"{start:.3g}: try a lower --lr-g")
    if row["variance"] < VARIETY * variance:
        return (f"the samples lose variety: their variance fell from {variance:.2f} to "
                f"{row['variance']:.2f} of the reference's; try a lower --lr-g or --h be")
    if row["to_data"] > WORSE * best:
        return (f"the distance rises, from {best:.3g} to {row['to_data']:.3g}: try a lower --lr-g "
                "or a higher --t-min")
    return ""
