"""What a replay must tell the services: spans of event time pass so fast that some defaults do not fit.

A service's delay of ten wall milliseconds is seven seconds of event time at rate 720. Delays that stand for "until the
messages are here" are therefore stretched; everything that is a decision of the paper (xi, the evaluator's grace
period, the trailing window) stays as it is in production.
"""

import json

from deploy.demo.day import DemoDay

LATENESS_WALL_S = 2.5
"""How late a message may come in, on a busy machine of two cores."""


def service_settings(day: DemoDay) -> dict[str, dict[str, str]]:
    """Environment added to each service, by its name."""
    late_event_s = LATENESS_WALL_S * day.rate
    return {
        "router": {
            "SPROUT_ROUTER_SAMPLE_SHARE": str(day.pace.sample_share),
            # A stream for every request tells the time of the first token, at a cost in processor time.
            "SPROUT_ROUTER_STREAM_ALWAYS": "true",
        },
        "optimizer": {
            "SPROUT_OPTIMIZER_XI": json.dumps({"preference": 0.1}),
            "SPROUT_OPTIMIZER_CAUTION": str(day.pace.caution),
        },
        "evaluator": {
            "SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION": str(day.pace.evaluated_prompts),
            "SPROUT_EVALUATOR_MIN_SAMPLES": str(day.pace.first_samples),
            "SPROUT_EVALUATOR_CONCURRENCY": str(day.pace.evaluator_concurrency),
            "SPROUT_EVALUATOR_MAX_TOKENS": str(day.pace.max_tokens),
            "SPROUT_EVALUATOR_MIN_JUDGED_TO_LEARN": str(day.pace.first_lesson),
        },
        "ledger": {
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "0.5",
            "SPROUT_LEDGER_SETTLE_DELAY_S": f"{late_event_s:.0f}",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "1",
        },
    }
