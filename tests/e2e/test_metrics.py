"""What each process of a stack exports: its own metrics alone, with true values."""

import json

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import bundled, user
from tests.system import wait_for

SHARED = {
    "stage_seconds", "embedding_lookups", "embeddings_refused", "embedding_bytes",
    "embedding_evictions", "store_failures", "errors", "registry_reachable", "registry_failures",
}  # fmt: skip
OWN = {
    "gateway": {
        "requests", "requests_in_flight", "tokens", "time_to_first_token_seconds",
        "inter_token_seconds", "patches_waiting", "work_waiting_seconds", "workers", "retries",
        "failovers", "reencodes", "llm_choices",
    },
    "encoder": {
        "patches_pending", "items_pending", "batch_items", "batch_patches", "batches_split",
        "items_encoded", "decodes_ended", "items_audited", "store_bytes",
    },
    "llm": {
        "kv_blocks", "kv_blocks_free", "kv_blocks_cached", "kv_blocks_evicted", "sequences",
        "preemptions", "llm_tokens", "store_bytes", "step_seconds", "prefill_tokens_per_second",
    },
}  # fmt: skip
STAGES = {
    "gateway": {
        "read",
        "check",
        "fetch",
        "plan",
        "name",
        "render",
        "pair",
        "prepare",
        "encoder_wait",
        "worker_wait",
        "wire",
    },
    "encoder": {"encoder_queue", "preprocess", "encode", "put"},
    "llm": {"queue", "get", "prefill", "decode"},
}


def addresses(stack):
    """Where each process says its metrics are, by its name."""
    told = [json.loads(line) for line in stack.log().splitlines()]
    found = {
        line["process"]: line["message"].removeprefix("metrics at ")
        for line in told
        if line["message"].startswith("metrics at ")
    }
    return {"gateway": f"{stack.url}/metrics", **found}


def scrape(url):
    """Samples of our metrics: {family without prefix: {(name, labels): value}}"""
    text = httpx2.get(url, trust_env=False).text
    return {
        family.name.removeprefix("opticnerve_"): {
            (sample.name.removeprefix("opticnerve_"), *sorted(sample.labels.values())): sample.value
            for sample in family.samples
        }
        for family in text_string_to_metric_families(text)
        if family.name.startswith("opticnerve_") and not family.name.endswith("_created")
    }


def loads(stack):
    """What encoder and LLM worker last said to the gateway of their work."""
    health = stack._http.get("/health").json()
    return [health[kind]["workers"][0]["load"] for kind in ("encoders", "llms")]


def test_each_process_exports_its_own(stack, client):
    question = user("What is this?", bundled("star.png"))
    client.chat.completions.create(model="model", messages=[question], max_tokens=4)
    where = addresses(stack)
    assert where.keys() == OWN.keys()
    found = {name: scrape(url) for name, url in where.items()}
    for name, metrics in found.items():
        assert metrics.keys() == SHARED | OWN[name]
        stages = {sample[1] for sample in metrics["stage_seconds"] if "count" in sample[0]}
        assert stages and stages <= STAGES[name]
    assert found["gateway"]["requests"][("requests_total", "/v1/chat/completions", "200")] >= 1
    assert found["encoder"]["items_encoded"][("items_encoded_total",)] >= 1
    assert found["encoder"]["patches_pending"] == {("patches_pending",): 0}
    assert found["encoder"]["store_bytes"][("store_bytes",)] > 0
    assert found["llm"]["llm_tokens"][("llm_tokens_total", "completion")] >= 1


def test_values_are_those_of_the_workers(stack):
    where = addresses(stack)

    def agree():
        encoder, llm = loads(stack)
        seen = scrape(where["llm"])
        return (
            seen["kv_blocks_free"][("kv_blocks_free",)] == llm["free_kv_blocks"] > 0
            and seen["sequences"][("sequences", "running")] == llm["running"] == 0
            and scrape(where["encoder"])["items_encoded"][("items_encoded_total",)]
            == encoder["encoded_items"]
        )

    wait_for("metrics and /health to say the same", agree)
