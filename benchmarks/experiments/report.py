"""What the runs of a recipe show: a table with intervals over seeds, differences, verdicts and a figure.

The text goes into the recipe's page between `<!-- results: NAME -->` and `<!-- end of results: NAME -->`.
"""

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.experiments.figure import OVER_COMPUTE, curve_of, draw, flops_spent, title
from benchmarks.experiments.recipe import CUT, DIVERGED, DONE, Recipe
from benchmarks.experiments.results import Results
from benchmarks.experiments.sharing import MPS, SLICES

# 97.5% points of Student's t by degrees of freedom: the half width of a 95% interval in standard errors.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
ONE_SEED = "one seed"
LEAST_SEEDS = 3  # pairs below which nothing is called a difference, whatever the interval
# Columns that a run has at its end only.
_MEASURED = (
    *("heldout_", "forgotten_", "max_logit", "last_max_logit", "clipped_"),
    *("recall_", "best_", "signal_", "noise_", "lambda"),
)
FULL_PARAMETERS, FULL_TOKENS = 110e6, 300e6  # the size that the question deserves


def report(recipe: Recipe, results: Results, pages: Path) -> str:
    """Fill the recipe's part of its page and draw its figure.

    Args:
        recipe: what was asked.
        results: its finished runs.
        pages: folder that the recipe's `page` is in; where the page does not exist, only the figure is written.

    Returns:
        str: the text.
    """
    lines = [f"<!-- results: {recipe.name} -->"]
    records, tokens = comparable(recipe, results)
    chosen = {arm: chosen_runs(recipe, records, arm) for arm in recipe.arms}
    page = pages / recipe.page
    picture = page.with_name(f"{recipe.name}.png")
    if any(len(records) > 1 for records in chosen.values()):
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(recipe, results, chosen, picture)
        panels = [title(entry) + ("" if entry.endswith(OVER_COMPUTE) else " over tokens") for entry in recipe.plot]
        lines += [f"![{'; '.join(panels)}]({picture.name})", ""]
    lines += [*settings_lines(recipe, results), ""]
    if records:
        lines += comparison_lines(recipe, records, tokens, chosen, results)
    lines += [f"<!-- end of results: {recipe.name} -->"]
    text = "\n".join(lines)
    if page.is_file():
        fill(page, text)
    return text


def comparison_lines(
    recipe: Recipe, records: Mapping[str, dict], tokens: int | None, chosen: Mapping[str, dict], results: Results
) -> list[str]:
    """The tables."""
    lines = []
    if tokens:
        lines = [f"**Not every arm has a finished run**: all values are those after {tokens / 1e6:.1f}M tokens.", ""]
    if recipe.same:
        lines += [spread(recipe, chosen), ""]
    lines += [*table(recipe, chosen), ""]
    lines += [*differences(recipe, chosen, results), ""]
    if any(len(recipe.points(arm)) > 1 for arm in recipe.arms):
        lines += [*sweep_table(recipe, records), "", *other_rates(recipe, records, chosen, results)]
    return lines


def comparable(recipe: Recipe, results: Results) -> tuple[dict[str, dict], int | None]:
    """Records that may be compared.

    Where every arm that was begun has a finished run, these are the finished ones. Else all runs are taken, each as it
    was at the last evaluation that all of them reached.

    Returns:
        tuple: records by key; and the tokens at that evaluation, None where the runs are finished.
    """
    begun = {record["arm"] for record in results.records.values()}
    if begun == {record["arm"] for record in results.finished.values()}:
        return results.finished, None
    measured = {key: _evaluations(results.curves[key]) for key in results.records}
    tokens = max(set.intersection(*map(set, measured.values())))
    records = {}
    for key, record in results.records.items():
        kept = {name: record[name] for name in record if not name.startswith(_MEASURED)}
        records[key] = kept | measured[key][tokens] | {"status": DONE, "tokens": tokens}
    return records, tokens


def _evaluations(points: list[tuple[int, str, float]]) -> dict[int, dict[str, float]]:
    """Held-out losses by tokens."""
    found: dict[int, dict[str, float]] = {}
    for tokens, measure, value in points:
        if measure.startswith("heldout_"):
            found.setdefault(tokens, {})[measure] = value
    return found


def chosen_runs(recipe: Recipe, records: Mapping[str, dict], arm: str) -> dict[int, dict]:
    """An arm's finished runs by seed, at its best learning rate unless another one has more seeds."""
    by_point = [runs_at(recipe, records, arm, point) for point in range(len(recipe.points(arm)))]
    best = by_point[recipe.best_point(arm, records) or 0]
    return max([best, *by_point], key=len)


def runs_at(recipe: Recipe, records: Mapping[str, dict], arm: str, point: int) -> dict[int, dict]:
    """An arm's finished runs at one of its learning rates, by seed."""
    keys = {seed: recipe.run(arm, point, seed).key for seed in recipe.seeds}
    return {seed: records[key] for seed, key in keys.items() if key in records}


def other_rates(
    recipe: Recipe, records: Mapping[str, dict], chosen: Mapping[str, dict], results: Results
) -> list[str]:
    """Tables at learning rates that are not every arm's best, but have several arms with all seeds."""
    lines = []
    for point, settings in enumerate(recipe.sweep):
        runs = {arm: runs_at(recipe, records, arm, point) for arm in recipe.arms if recipe.arms[arm].sweep is None}
        runs = {arm: found for arm, found in runs.items() if len(found) == len(recipe.seeds)}
        if len(runs) < 2 or all(found == chosen[arm] for arm, found in runs.items()):
            continue
        runs = {arm: runs.get(arm, {}) for arm in recipe.arms}
        lines += [f"The same at learning rate {settings['learning_rate']:g} for these arms:", ""]
        lines += [*table(recipe, runs), "", *differences(recipe, runs, results), ""]
    return lines


def values_of(records: Mapping[int, dict], measure: str) -> dict[int, float]:
    """A measure by seed, of runs that ended well."""
    return {
        seed: float(record[measure])
        for seed, record in records.items()
        if record["status"] != DIVERGED and record.get(measure) not in (None, "")
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half width of its 95% interval by Student's t; NaN for one value.

    Raises:
        ValueError: there are more values than the table of t has.
    """
    if len(values) < 2:
        return values[0], math.nan
    if len(values) - 1 not in STUDENT:
        raise ValueError(f"{len(values)} seeds: the table of Student's t ends at {max(STUDENT) + 1}")
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), STUDENT[len(values) - 1] * error


def spread(recipe: Recipe, chosen: Mapping[str, dict[int, dict]]) -> str:
    """How far the arms are apart in what should be the same."""
    column = {"parameters": "parameters", "flops": "flops_per_token"}[recipe.same]
    sizes = [first(records, column) for records in chosen.values() if records]
    apart = max(sizes) / min(sizes) - 1
    warning = "" if recipe.tiny or apart <= recipe.within else f" **That is more than {recipe.within:.1%}.**"
    return f"The arms' {column.replace('_', ' ')} differ by at most {apart:.2%}.{warning}"


def table(recipe: Recipe, chosen: Mapping[str, dict[int, dict]]) -> list[str]:
    """Arms by measures, each a mean with its interval."""
    arms = [arm for arm in recipe.arms if chosen[arm]]
    lines = [
        f"| measure | {' | '.join(recipe.arms[arm].label for arm in arms)} |",
        "|---" * (len(arms) + 1) + "|",
        "| learning rate | " + " | ".join(f"{rate(chosen[arm]):g}" for arm in arms) + " |",
        "| seeds | " + " | ".join(seeds_of(chosen[arm]) for arm in arms) + " |",
        "| parameters | " + " | ".join(f"{first(chosen[arm], 'parameters') / 1e6:.2f}M" for arm in arms) + " |",
        "| MFLOPs a token | "
        + " | ".join(f"{first(chosen[arm], 'flops_per_token') / 1e6:.1f}" for arm in arms)
        + " |",
    ]
    for measure in recipe.measures:
        cells = [cell(values_of(chosen[arm], measure)) for arm in arms]
        if any(cells):
            lines.append(f"| {title(measure)} | {' | '.join(text or '-' for text in cells)} |")
    return lines


def cell(values: Mapping[int, float]) -> str:
    """`mean ± half width`."""
    if not values:
        return ""
    mean, half = interval(list(values.values()))
    return number(mean, mean) + ("" if math.isnan(half) else f" ± {number(half, mean)}")


def number(value: float, beside: float) -> str:
    """With decimals that suit a value of the size of `beside`."""
    return f"{value:.0f}" if abs(beside) >= 1000 else f"{value:.1f}" if abs(beside) >= 20 else f"{value:.4f}"


def seeds_of(records: Mapping[int, dict]) -> str:
    """Number of seeds, and how many of them diverged."""
    diverged = sum(record["status"] == DIVERGED for record in records.values())
    return f"{len(records)}" + (f", {diverged} diverged" if diverged else "")


def rate(records: Mapping[int, dict]) -> float:
    return first(records, "learning_rate")


def first(records: Mapping[int, dict], name: str) -> float:
    return float(next(iter(records.values()))[name])


def differences(recipe: Recipe, chosen: Mapping[str, dict[int, dict]], results: Results) -> list[str]:
    """Each arm against its baseline, paired by seed, with a verdict on the first measure compared."""
    lines = [
        "Differences, paired by seed, with their 95% interval:",
        "",
        "| arm | against | measure | seeds | difference | interval | shown? | tokens to the baseline's last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    grown = any(arm.grow for arm in recipe.arms.values())
    if grown:
        lines[-2:] = [lines[-2] + " compute to it |", lines[-1] + "---|"]
    verdicts = []
    for arm in recipe.arms:
        for baseline in recipe.baselines(arm):
            for index, measure in enumerate(recipe.compared):
                pairs = paired(chosen[arm], chosen[baseline], measure)
                if not pairs:
                    continue
                mean, half = interval(pairs)
                enough = len(pairs) >= LEAST_SEEDS
                shown = enough and abs(mean) > half
                runs = chosen[arm], chosen[baseline], results
                shares = [
                    spent_to_equal(*runs, compute) if index == 0 else "" for compute in (False, True)[: 1 + grown]
                ]
                bounds = ONE_SEED if math.isnan(half) else f"{mean - half:+.4f} to {mean + half:+.4f}"
                names = f"{recipe.arms[arm].label} | {recipe.arms[baseline].label} | {title(measure)}"
                answer = "yes" if shown else "no" if enough else "too few seeds"
                lines.append(f"| {names} | {len(pairs)} | {mean:+.4f} | {bounds} | {answer} | {' | '.join(shares)} |")
                if index == 0:
                    verdicts.append(verdict(recipe, arm, baseline, pairs, bounds, shown))
    return [*lines, "", *(f"- {text}" for text in verdicts)]


def paired(records: Mapping[int, dict], baseline: Mapping[int, dict], measure: str) -> list[float]:
    """Differences of a measure by seed, where both have it."""
    own, other = values_of(records, measure), values_of(baseline, measure)
    return [own[seed] - other[seed] for seed in own if seed in other]


def verdict(recipe: Recipe, arm: str, baseline: str, pairs: list[float], bounds: str, shown: bool) -> str:
    """One sentence on the first measure compared."""
    names = f"**{recipe.arms[arm].label}** against {recipe.arms[baseline].label}: {title(recipe.compared[0])}"
    mean = statistics.mean(pairs)
    if bounds == ONE_SEED:
        return f"{names}: {mean:+.4f} on one seed, which shows nothing."
    if len(pairs) < LEAST_SEEDS:
        return f"{names}: {mean:+.4f} on {len(pairs)} seeds, too few to call it a difference ({bounds})."
    if not shown:
        return f"{names}: no difference shown ({mean:+.4f}, {bounds})."
    better = (mean < 0) == recipe.lower_is_better
    return f"{names}: {'better' if better else 'worse'} by {abs(mean):.4f} ({bounds})."


def spent_to_equal(
    records: Mapping[int, dict], baseline: Mapping[int, dict], results: Results, compute: bool = False
) -> str:
    """Share of its tokens, or of all its FLOPs, after which the arm is at the last loss of the baseline's run.

    Runs are paired by seed. FLOPs are those of a small model too that was grown; so the share may exceed 1.
    """
    shares = []
    for seed in sorted(set(records) & set(baseline)):
        own, other = (curve_of(results, runs[seed], "heldout_mean") for runs in (records, baseline))
        other = [point for point in other if point[0] <= float(baseline[seed]["tokens"])]
        if not own or not other:
            continue
        reached = crossing(own, other[-1][1])
        if reached is None:
            return "not reached"
        ends = [(records[seed], reached), (baseline[seed], other[-1][0])]
        spent, whole = (flops_spent(*end) if compute else end[1] for end in ends)
        shares.append(spent / whole)
    return cell(dict(enumerate(shares)))


def crossing(curve: list[tuple[int, float]], level: float) -> float | None:
    """Tokens at which a falling curve first is at `level`, between its points along a line; None if it never is."""
    if curve[0][1] <= level:
        return curve[0][0]
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= level:
            return before + (after - before) * (1.0 if high <= low else max(0.0, (high - level) / (high - low)))
    return None


def sweep_table(recipe: Recipe, records: Mapping[str, dict]) -> list[str]:
    """Held-out loss on the first seed at every learning rate; the chosen one in bold."""
    lines = [
        f"Learning rates, chosen by the mean held-out loss on seed {recipe.seeds[0]}:",
        "",
        "| arm | learning rate: loss |",
        "|---|---|",
    ]
    for arm in recipe.arms:
        points = recipe.points(arm)
        if len(points) < 2:
            continue
        best, cells = recipe.best_point(arm, records), []
        for index in sorted(range(len(points)), key=lambda point: points[point]["learning_rate"]):
            record = records.get(recipe.run(arm, index, recipe.seeds[0]).key, {"status": "not run"})
            loss = record.get("heldout_mean") if record["status"] == "done" else None
            text = f"{points[index]['learning_rate']:g}: {float(loss):.4f}" if loss else record["status"]
            cells.append(f"**{text}**" if index == best else text)
        lines.append(f"| {recipe.arms[arm].label} | {', '.join(cells)} |")
    return lines


def settings_lines(recipe: Recipe, results: Results) -> list[str]:
    """Where and how the runs were made, and what the full size would cost at their speed."""
    records = list(results.records.values())
    if not records:
        return ["No run has been made."]
    places = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}" for row in records})
    tokens = sum(float(row["tokens"]) for row in records)
    seconds = sum(float(row["seconds"]) / float(row["workers_per_device"]) for row in records)
    shared = " or ".join(sorted({sharing(row) for row in records}))
    speed = statistics.median(float(row["tokens"]) / float(row["seconds"]) for row in records)
    parameters = statistics.mean(float(row["parameters"]) for row in records)
    missing = {run.key for run in recipe.runs(results.finished)} - set(results.records)
    cut = sum(row["status"] == CUT for row in records)
    stopped = f" ({cut} of them cut for lack of time)" if cut else ""
    unmade = f", {len(missing)} not made yet" if missing else ""
    full_hours = seconds / tokens * FULL_TOKENS * (len(records) + len(missing)) * FULL_PARAMETERS / parameters / 3600
    return [
        f"{len(records)} runs{stopped}{unmade}, {lengths(records)}, on "
        f"{'; '.join(places)}; "
        f"{seconds / 3600:.2f} GPU-hours in all, {speed:,.0f} tokens a second a run (median) with "
        f"{shared} runs a GPU at once. As many runs of {FULL_PARAMETERS / 1e6:.0f}M "
        f"parameters and {FULL_TOKENS / 1e6:.0f}M tokens would take about {full_hours:,.0f} GPU-hours at this "
        "throughput a parameter, which larger models exceed."
    ]


def lengths(records: list[dict]) -> str:
    """How many tokens the runs read, from the shortest to the longest."""
    read = [float(record["tokens"]) / 1e6 for record in records]
    shortest, longest = f"{min(read):.1f}", f"{max(read):.1f}"
    return f"{shortest}M tokens each" if shortest == longest else f"{shortest}M to {longest}M tokens"


def sharing(record: Mapping) -> str:
    """How many runs shared its GPU, and how."""
    count = record["workers_per_device"]
    return f"{count} ({record['sharing']})" if record.get("sharing") in (MPS, SLICES) else str(count)


def fill(page: Path, text: str) -> None:
    """Put the text between its marks.

    Raises:
        ValueError: the page has no such marks.
    """
    start, end = text.splitlines()[0], text.splitlines()[-1]
    content = page.read_text(encoding="utf-8")
    if start not in content or end not in content:
        raise ValueError(f"{page} has no lines {start!r} and {end!r}: put them where the results shall be")
    page.write_text(
        content[: content.index(start)] + text + content[content.index(end) + len(end) :], encoding="utf-8"
    )
