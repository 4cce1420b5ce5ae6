"""What the dashboard is made of: a chart, a large number, a choice; all of them ask the data source that is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="$datasource")
_WHO: Final = 'job=~"$job", instance=~"$instance"'
COLUMNS: Final = 24
"""Of the grid."""

WIDTH: Final = 8
_HEIGHT: Final = 8


def _query(text: str, legend: str, place: int) -> Dataquery:
    """Return a query; in *text* `WHO` stands for the chosen processes."""
    query = Dataquery().expr(text.replace("WHO", _WHO)).legend_format(legend).ref_id(chr(ord("A") + place))
    return query.datasource(_SOURCE)


def chart(title: str, unit: str, description: str, *queries: tuple[str, str], stacked: bool = False) -> TimeSeries:
    """Return a chart of *queries*, each with its legend, in *unit*."""
    panel = (
        TimeSeries()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .min(0)
        .span(WIDTH)
        .height(_HEIGHT)
        .line_width(1)
        .fill_opacity(30 if stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .legend(
            common_builders.VizLegendOptions().show_legend(show_legend=True).placement(common.LegendPlacement.BOTTOM)
        )
    )
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    for place, (text, legend) in enumerate(queries):
        panel = panel.with_target(_query(text, legend, place))
    return panel


def number(title: str, unit: str, description: str, text: str, *, limits: Sequence[tuple[float, str]] = ()) -> Stat:
    """Return one large number, green below the first of *limits*, then coloured as they say."""
    steps = [Threshold(None, "green"), *(Threshold(value, color) for value, color in limits)]
    return (
        Stat()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .span(4)
        .height(4)
        .thresholds(builders.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(text, "", 0))
    )


def variable(name: str, label: str, query: str) -> builders.QueryVariable:
    """Return a choice, above the panels, of any of what *query* finds."""
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(multi=True)
        .include_all(include_all=True)
    )
