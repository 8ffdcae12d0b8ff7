"""The explanation of a policy on the screen, as tables."""

from rich.table import Column, Table
from rich.text import Text

from shared.messages import Policy
from shared.runtime.logs import printable
from tools.cli.console import out
from tools.cli.explanation import Explanation, in_points

_MOST_GROUPS = 12
"""Groups whose options are explained, the largest first."""


def print_explanation(explanation: Explanation) -> None:
    """Print the explanation to standard output."""
    policy = explanation.policy
    heading = f"policy {policy.version} of {policy.model}: {policy.status}"
    out.print(printable(heading), style="bold", markup=False)
    out.print(f"made {policy.created_at:%Y-%m-%d %H:%M}, valid until {policy.valid_until:%Y-%m-%d %H:%M} (UTC)")
    out.print(printable(policy.reason), markup=False)
    saving = 1.0 - policy.expected_g_per_request / (policy.reference_g_per_request or 1.0)
    out.print(
        f"expected {policy.expected_g_per_request:.4g} gCO2eq per request, {100.0 * saving:.1f} % less than "
        f"{policy.reference_g_per_request:.4g} if {policy.reference} served all requests",
        markup=False,
    )
    if not explanation.agrees:
        out.print(
            f"the rebuilt program gives {explanation.rebuilt_g_per_request:.4g} g: a limit is missing in this policy's "
            "inputs, or it was made by another release"
        )
    _print_prices(policy)
    _print_promise(policy)
    _print_limits(explanation)
    if explanation.binding:
        out.print("\nBinding constraints", style="bold")
        for one in explanation.binding:
            out.print(printable(f"{one.name}: {one.meaning}"), markup=False)
    else:
        out.print("\nno constraint is binding")
    _print_probabilities(explanation)
    _print_choices(explanation)


def _print_prices(policy: Policy) -> None:
    if not policy.inputs.prices:
        return
    table = _table(
        "Energy of a token", "pool", "basis", "batch", "generated", "of the prompt", "on the meter", "reason"
    )
    for pool, price in policy.inputs.prices.items():
        batch = "" if price.batch is None else f"{price.batch:.3g}"
        joules = (price.token_j, price.prompt_token_j, price.meter_token_j)
        _add_row(
            table, pool, price.basis, batch, *("" if one is None else f"{one:.3g} J" for one in joules), price.reason
        )
    out.print()
    out.print(table)


def _print_promise(policy: Policy) -> None:
    """The account of a promise by period; nothing with an hourly promise."""
    promise = policy.promise
    if promise is None:
        return
    table = _table("Promise by period", "metric", "from", "to", "state", "promised", "kept", "hourly floor")
    closed = [] if promise.previous is None else [(promise.previous, "closed")]
    for account, state in (*closed, (promise.current, "so far")):
        for metric, promised in account.promised.items():
            floor = promise.hourly_floors.get(metric)
            _add_row(
                table,
                metric,
                *(f"{time:%Y-%m-%d}" for time in (account.start, account.end)),
                state,
                f"{100.0 * promised:.2f} %",
                f"{100.0 * account.kept[metric]:.2f} %",
                "" if floor is None else f"{100.0 * floor:.2f} %",
            )
    out.print()
    if table.rows:
        out.print(table)
    else:
        out.print("Promise by period: nothing is booked yet")


def _print_limits(explanation: Explanation) -> None:
    if not explanation.limits:
        return
    of = "" if explanation.policy.promise is None else " of the rest of the period"
    table = _table(f"Quality limits{of}", "metric", "required", "mean", "margin", "mean - margin", "slack", "price")
    for one in explanation.limits:
        price = one.outcome.carbon_points_per_point
        _add_row(
            table,
            one.metric,
            f"{100.0 * one.outcome.required:.2f} %",
            f"{100.0 * one.outcome.mean:.2f} %",
            f"{100.0 * one.outcome.margin:.2f} ({one.z:.2f} standard errors)",
            f"{100.0 * (one.outcome.mean - one.outcome.margin):.2f} %",
            f"{100.0 * one.slack:.2f}",
            f"{in_points(price)} of carbon per point" if one.is_binding else "not binding",
        )
    out.print()
    out.print(table)


def _print_probabilities(explanation: Explanation) -> None:
    options = list(explanation.problem.options)
    settled = explanation.policy.settled
    table = _table("Probabilities", "group", "share of traffic", *options, *(["settled since"] if settled else []))
    table.columns[0].no_wrap = True
    weights = explanation.problem.weights
    for group, row in sorted(explanation.rows.items(), key=lambda one: -weights.get(one[0], 0.0)):
        share = f"{100.0 * weights.get(group, 0.0):.1f} %"
        since = [f"{settled[group]:%Y-%m-%d %H:%M}" if group in settled else ""] if settled else []
        _add_row(table, group, share, *(_share(row, option) for option in options), *since)
    if explanation.policy.groups:
        others = [_share(explanation.policy.overall, option) for option in options]
        _add_row(table, "other groups", "", *others, *([""] if settled else []))
    out.print()
    out.print(table)


def _print_choices(explanation: Explanation) -> None:
    """Why each of the largest groups has its options."""
    if explanation.program is None:
        return
    metrics = list(explanation.problem.bounds)
    table = _table(
        "Why: what one request more with an option changes",
        "group", "option", "probability", "grams", *metrics, "all traffic emits more by",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    weights = explanation.problem.weights
    largest = sorted(explanation.choices, key=lambda group: -weights[group])[:_MOST_GROUPS]
    for group in largest:
        for option, one in explanation.choices[group].items():
            _add_row(
                table,
                group,
                option,
                _share(explanation.rows.get(group, {}), option),
                f"{one.grams:.3g}",
                *(f"{100.0 * one.quality[metric]:.1f} %" if metric in one.quality else "" for metric in metrics),
                "0: in use" if one.is_in_use else f"{one.extra_g:.2g} g",
            )
    out.print()
    out.print(table)
    if len(explanation.choices) > _MOST_GROUPS:
        out.print(f"the {_MOST_GROUPS} largest of {len(explanation.choices)} groups; all are in --json")


def _table(title: str, *headings: str) -> Table:
    return Table(*(Column(header=_text(heading)) for heading in headings), title=title, title_justify="left")


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(_text(cell) for cell in cells))


def _text(cell: str) -> Text:
    """A cell without markup: groups are task labels of clients, and Rich parses strings as markup."""
    return Text(printable(cell))


def _share(row: dict[str, float], option: str) -> str:
    return f"{100.0 * row[option]:.1f} %" if option in row else ""
