"""The SQL of a settlement; rows go in and out in bulk, as arrays and as JSON recordsets."""

LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('sprout.ledger.settlement'))"
READINGS = """
SELECT r.endpoint, r.at, r.gpu, r.energy_j
FROM unnest($1::text[]) AS e (endpoint)
LEFT JOIN meters AS m USING (endpoint)
CROSS JOIN LATERAL (
    SELECT * FROM readings
    WHERE readings.endpoint = e.endpoint AND at >= coalesce(m.settled_until, '-infinity') AND at <= $2
) AS r
ORDER BY r.endpoint, r.at
"""
METERS = "SELECT * FROM meters WHERE endpoint = ANY($1)"
CALLS = """
SELECT c.*
FROM unnest($1::text[], $2::timestamptz[]) AS e (endpoint, until)
CROSS JOIN LATERAL (
    SELECT id, purpose, endpoint, zone, pool, level, started_at, first_token_at, finished_at, prompt_tokens,
           completion_tokens, energy_j, accounted_until, partial
    FROM calls WHERE calls.endpoint = e.endpoint AND NOT settled AND started_at <= e.until
) AS c
"""
SETTLED = """
SELECT i.endpoint, i.started_at, i.finished_at, i.attributed_j, i.unattributed_j
FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS e (endpoint, since, until)
CROSS JOIN LATERAL (
    SELECT * FROM intervals
    WHERE intervals.endpoint = e.endpoint AND finished_at >= e.since AND started_at <= e.until
) AS i
"""
INTENSITY = "SELECT zone, at, intensity_g_per_kwh FROM intensity WHERE zone = ANY($1) AND at >= $2 AND at <= $3"
ADD_INTERVALS = """
INSERT INTO intervals SELECT * FROM jsonb_populate_recordset(NULL::intervals, $1)
"""
RECOVER = """
UPDATE intervals SET attributed_j = intervals.attributed_j + intervals.unattributed_j, unattributed_j = 0
FROM jsonb_populate_recordset(NULL::intervals, $1) AS late
WHERE intervals.endpoint = late.endpoint AND intervals.started_at = late.started_at
"""
UPDATE_CALLS = """
UPDATE calls SET energy_j = new.energy_j, accounted_until = new.accounted_until, partial = new.partial,
                 settled = new.settled
FROM jsonb_populate_recordset(NULL::calls, $1) AS new
WHERE calls.id = new.id
"""
ADD_FOOTPRINTS = """
INSERT INTO footprints (
    request_id, purpose, evaluation_id, model, grp, task, tenant, pool, level, zone, endpoint, policy_version,
    decision_source, propensity, propensities, started_at, finished_at, processing_s, prompt_tokens,
    completion_tokens, energy_j, intensity_g_per_kwh, operational_g, embodied_g, total_g, partial
)
SELECT c.id, c.purpose, c.evaluation_id, c.model, c.grp, c.task, c.tenant, c.pool, c.level, c.zone, c.endpoint,
       c.policy_version, c.decision_source, c.propensity, c.propensities, c.started_at, c.finished_at,
       f.processing_s, c.prompt_tokens, c.completion_tokens, f.energy_j, f.intensity_g_per_kwh, f.operational_g,
       f.embodied_g, f.total_g, f.partial
FROM jsonb_populate_recordset(NULL::footprints, $1) AS f JOIN calls AS c ON c.id = f.request_id
ON CONFLICT (request_id) DO NOTHING
"""
PUT_METERS = """
INSERT INTO meters SELECT * FROM jsonb_populate_recordset(NULL::meters, $1)
ON CONFLICT (endpoint) DO UPDATE SET settled_until = EXCLUDED.settled_until, idle_power_w = EXCLUDED.idle_power_w,
    quiet_s = EXCLUDED.quiet_s, quiet_j = EXCLUDED.quiet_j
"""
CLOSE_UNMETERED = """
WITH closed AS (
    UPDATE calls SET settled = true WHERE NOT settled AND finished_at <= $2 AND endpoint <> ALL($1) RETURNING 1
)
SELECT count(*) FROM closed
"""
UNSETTLED = "SELECT count(*) FROM calls WHERE NOT settled"
