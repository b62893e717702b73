"""What tables and pictures show, in words."""


def _flowing(text: str) -> str:
    return " ".join(text.split())


MAIN = _flowing(
    """
    Final accuracy is that of the last round, best accuracy the highest of any round: mean ± sample standard deviation
    over the seeds. Bytes are those of the whole run, up (sent by clients) and down (sent to them), in all and for each
    of the clients (1 MB = 1,000,000 bytes), mean over the seeds. On the Pareto front of bytes sent up, or up and down
    in all, is a method at whose final mean accuracy over the seeds, or above it, no other has been with fewer bytes.
    """
)
PERSONAL = _flowing(
    """
    Personal accuracy is that of each client's own model on its own held-out samples, mean over the clients.
    """
)
BUDGETS = _flowing(
    """
    The last evaluation by which all clients together had sent at most so many MB, mean ± sample standard deviation
    over the seeds: every method is stopped at equal bytes, one with large messages after fewer rounds. The best of a
    column is marked. †: the whole run sent no more than the budget. ‡: untrained, as a single round sends more.
    """
)
AUTOMATIC_BUDGETS = _flowing(
    """
    The budgets are the three smallest of: a quarter of the smallest total uplink of a method, that total, the median
    of the methods' totals, and the largest; rounded up to two digits.
    """
)
TARGETS = _flowing(
    """
    Charged until the mean over the seeds first reaches the target; MB are sent by all clients together, to them, or
    both in all. The fewest of a column are marked.
    """
)
SPREAD = _flowing(
    """
    Accuracy of the clients on their own held-out samples at the last evaluation, with the global model and, where a
    method has them, with their own models: mean and standard deviation over the clients, and the mean of the tenth of
    the clients with the lowest accuracy. Each is the mean ± sample standard deviation over the seeds.
    """
)
SPREAD_CHARTS = _flowing(
    """
    Dots are the mean over the clients, filled with the global model, open with their own models; bars are the worst
    decile.
    """
)
ERRORS = _flowing(
    """
    How far what the server went on with was from the exact mean of the clients' updates, relative to that mean
    (Frobenius norms, mean over layers and seeds). 0: exact up to rounding in float32.
    """
)
ERROR_CHARTS = "The axis is logarithmic; methods that are exact are in the table alone."
LEARNED = _flowing(
    """
    Of W - W0 of each matrix at the end of a run: stable rank (squared Frobenius over squared spectral norm), effective
    rank (exponential of the singular values' entropy) and how many singular values have 90 % of the squared norm. Of a
    layer trained by factors, how many entries were accumulated or in training, and, mean over the entries after the
    first, the share of an entry's squared norm in output and input directions that no earlier entry had (new), its
    cosine with the sum of the earlier ones (alignment), and the aggregation error over all entries. Mean ± sample
    standard deviation over the seeds; every entry, and the leading singular values, are in each run's rank.csv.
    """
)
CURVES = _flowing(
    """
    Lines are the mean over the seeds, bands one sample standard deviation to either side; the marker is the last
    evaluation. Against bytes the axis is logarithmic and counts what all clients together have sent, or sent and
    received. The broad grey line joins the ends of the methods on the Pareto front: at a front method's final accuracy,
    or above it, no other method has been with fewer bytes. All panels share the vertical axis.
    """
)
GAPS = _flowing(
    """
    Each method's final accuracy minus that of {reference} with the same seed: mean over the seeds, bars one sample
    standard deviation. Points of one number of clients are set side by side; the axis is logarithmic.
    """
)
PARTITIONS = _flowing(
    """
    How many training samples of each class each client has, with the first seed; the darker, the more. What a client
    holds out for its own evaluation is included.
    """
)
TUNING = _flowing(
    """
    Every candidate of each grid, its score ({by}, mean over the tuning runs with seed {seeds}{settings}) and the one
    chosen. "widened": added because the best value lay at the edge of the grid. A method without a model of the asked
    kind is judged by the one it has. All accuracies are on the samples that the other tables are about.
    """
)
SETTINGS = _flowing(
    """
    What a method has of its own beside the settings of every run, with the values chosen from its grid.
    """
)
TIME = _flowing(
    """
    Training and evaluation of one run, mean over the seeds, on the machine and under the load there was. No other
    number here depends on it.
    """
)
ANSWERS = _flowing(
    """
    What the global model answers to the first held-out prompts, before training and after it, with the first seed.
    """
)
