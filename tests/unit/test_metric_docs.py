"""docs/operations.md lists every metric that a process exports, and says what to do."""

import re

from tests.fault_counters import COUNTERS
from tests.metric_docs import DOCUMENT, ROW, TABLES, with_tables

TEXT = DOCUMENT.read_text()


def test_the_tables_are_those_of_the_declarations():
    assert with_tables(TEXT) == TEXT, "run python -m tests.metric_docs"


def test_every_metric_is_told_once_and_what_to_do():
    told = [name for name, _ in ROW.findall(TEXT)]
    declared = [metric.name for table in TABLES.values() for metric in table()]
    assert told == declared and len(set(told)) == len(told)
    assert all(advice.strip() not in ("", "TODO") for _, advice in ROW.findall(TEXT))


def test_names_and_labels_are_as_prometheus_wants_them():
    for metric in (metric for table in TABLES.values() for metric in table()):
        assert re.fullmatch(r"opticnerve_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not {"id", "request_id", "model", "path", "key"} & set(metric.labels)


def test_every_counter_of_faults_is_in_the_table_of_faults():
    faults = TEXT.partition("## Which counter shows a fault")[2].partition("\n## ")[0]
    assert {f"{name}_total" for name in COUNTERS} <= set(re.findall(r"`(opticnerve_\w+)", faults))


def test_queries_name_metrics_that_exist():
    declared = {metric.name for table in TABLES.values() for metric in table()}
    known = declared | {
        f"{name}_{part}" for name in declared for part in ("bucket", "sum", "count")
    }
    assert set(re.findall(r"\bopticnerve_[a-z_]+\b", TEXT)) <= known
