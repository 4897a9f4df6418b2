"""Tables of the studies that compare ways to the same budgets."""

from benchmarks.studies.ways import kept, tables

SETTINGS = {
    "annealing": {"models": ["small", "missing"]},
    "models": {"small": {"title": "A small model"}, "missing": {"title": "Not measured"}},
}


def test_results_are_measured_once_and_their_means_printed(tmp_path):
    measured = []

    for seed in (1, 2):
        (tmp_path / "small" / f"seed_{seed}").mkdir(parents=True)  # the model's

    def measure(seed):
        measured.append(seed)
        return [{"way": "as it is", "budget": 2.0, "kl": 0.1 * seed}, {"way": "trained", "budget": 2.0, "kl": 0.01}]

    for seed in (1, 2, 1):
        done = kept("small", seed, tmp_path, "found.json", lambda seed=seed: measure(seed))
    assert done == "small 1: found"
    assert measured == [1, 2]
    ways = [(2.0, "as it is"), (2.0, "trained")]
    printed = tables(SETTINGS, tmp_path, "found.json", "# Title\n", ways, {"kl": "KL"})
    assert printed.splitlines() == [
        "# Title",
        "",
        "### A small model (2 seeds)",
        "",
        "| bits | how | KL |",
        "|---|---|---|",
        "| 2 | as it is | 0.1500 |",
        "| 2 | trained | 0.0100 |",
    ]
    assert "run the study first" in tables(SETTINGS, tmp_path / "empty", "found.json", "", ways, {"kl": "KL"})
