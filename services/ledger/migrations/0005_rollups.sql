-- Sums over calls that replace their rows after the retention of rows. Every settled call is added once.

ALTER TABLE dimensions ADD COLUMN distribution uuid NOT NULL
    GENERATED ALWAYS AS (md5(propensities::text)::uuid) STORED;

CREATE TABLE distributions (
    id uuid PRIMARY KEY,
    propensities jsonb NOT NULL
);

-- The end of the days whose calls were removed: a call from before it was counted and is not added again.
CREATE TABLE removals (
    kept_from timestamptz NOT NULL
);
INSERT INTO removals VALUES ('-infinity');

-- Calls by the hour in which they started; without the tenant, who is forgotten with the rows. With these sums the saving estimator gives what it gives from the calls.
CREATE TABLE hourly_calls (
    hour timestamptz NOT NULL,
    purpose text NOT NULL,
    model text NOT NULL,
    grp text NOT NULL,
    task text,
    pool text NOT NULL,
    level text NOT NULL,
    zone text NOT NULL,
    policy_version int,
    decision_source text,
    distribution uuid NOT NULL,
    calls bigint NOT NULL,
    first_s float8 NOT NULL,
    last_s float8 NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    processing_s float8 NOT NULL,
    server_s float8 NOT NULL,
    energy_j float8 NOT NULL,
    embodied_g float8 NOT NULL,
    -- Sums of squares and products, for variances.
    energy_energy float8 NOT NULL,
    server_server float8 NOT NULL,
    energy_server float8 NOT NULL,
    -- Of the calls whose carbon intensity is known: number, sum of the intensity and of its square, gCO2eq.
    priced bigint NOT NULL,
    intensity float8 NOT NULL,
    intensity_intensity float8 NOT NULL,
    energy_intensity float8 NOT NULL,
    operational_g float8 NOT NULL,
    total_g float8 NOT NULL,
    total_total float8 NOT NULL,
    total_intensity float8 NOT NULL,
    -- Energy of the others.
    unpriced_j float8 NOT NULL,
    UNIQUE NULLS NOT DISTINCT (hour, purpose, model, grp, task, pool, level, zone, policy_version,
                               decision_source, distribution)
);

-- Calls by the two and a half minutes in which they started: the demand.
CREATE TABLE call_starts (
    at timestamptz NOT NULL,
    purpose text NOT NULL,
    pool text NOT NULL,
    level text NOT NULL,
    decision_source text,
    calls bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    processing_s float8 NOT NULL,
    UNIQUE NULLS NOT DISTINCT (at, purpose, pool, level, decision_source)
);

-- How latencies (ms) and lengths of answers (tokens) of requests are distributed: bucket n holds the values from 1.05^n
-- to 1.05^(n+1).
CREATE TABLE histograms (
    hour timestamptz NOT NULL,
    -- ttft and tpot by pool, tokens by prompt group and day: answers without a directive.
    kind text NOT NULL,
    name text NOT NULL,
    -- In a reference block of the switchback.
    in_block bool NOT NULL,
    bucket int NOT NULL,
    calls bigint NOT NULL,
    PRIMARY KEY (hour, kind, name, in_block, bucket)
);

CREATE TABLE hourly_evaluations (
    evaluation_id text NOT NULL,
    hour timestamptz NOT NULL,
    calls bigint NOT NULL,
    energy_j float8 NOT NULL,
    total_g float8 NOT NULL,
    PRIMARY KEY (evaluation_id, hour)
);

CREATE TABLE hourly_rejections (
    hour timestamptz NOT NULL,
    model text NOT NULL,
    code text NOT NULL,
    requests bigint NOT NULL,
    PRIMARY KEY (hour, model, code)
);

-- Intervals by five minutes; the energy of an interval is spread evenly over its time.
CREATE TABLE meter_sums (
    endpoint text NOT NULL,
    at timestamptz NOT NULL,
    pool text NOT NULL,
    zone text NOT NULL,
    metered_j float8 NOT NULL,
    attributed_j float8 NOT NULL,
    idle_j float8 NOT NULL,
    unattributed_j float8 NOT NULL,
    -- Energy of intervals without a call.
    unused_j float8 NOT NULL,
    covered_s float8 NOT NULL,
    busy_s float8 NOT NULL,
    idle_s float8 NOT NULL,
    lost bool NOT NULL,
    PRIMARY KEY (endpoint, at, pool, zone)
);
CREATE INDEX meter_sums_by_time ON meter_sums (at);

CREATE INDEX chunks_unpublished ON chunks (chunk) WHERE NOT published;
CREATE INDEX chunks_not_rolled_up ON chunks (chunk) WHERE NOT rolled_up;

-- What some chunks add to hourly_calls.
CREATE FUNCTION hourly_sums(wanted bigint[]) RETURNS SETOF hourly_calls LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
WITH sums AS (
    SELECT date_trunc('hour', started_at, 'UTC') AS hour, dimension, count(*) AS calls,
           min(extract(epoch FROM started_at))::float8 AS first_s, max(extract(epoch FROM started_at))::float8 AS last_s,
           sum(coalesce(prompt_tokens, 0)::bigint) AS prompt_tokens, sum(completion_tokens::bigint) AS completion_tokens,
           sum(seconds) AS processing_s, sum(server) AS server_s, sum(energy_j) AS energy_j,
           sum(embodied_g) AS embodied_g, sum(energy_j * energy_j) AS energy_energy,
           sum(server * server) AS server_server, sum(energy_j * server) AS energy_server,
           count(operational_g) AS priced, coalesce(sum(k), 0) AS intensity, coalesce(sum(k * k), 0) AS intensity_intensity,
           coalesce(sum(energy_j * k), 0) AS energy_intensity, coalesce(sum(operational_g), 0) AS operational_g,
           coalesce(sum(g), 0) AS total_g, coalesce(sum(g * g), 0) AS total_total,
           coalesce(sum(g * k), 0) AS total_intensity,
           coalesce(sum(energy_j) FILTER (WHERE operational_g IS NULL), 0) AS unpriced_j
    FROM (
        SELECT *, greatest(0, extract(epoch FROM finished_at - started_at)::float8) AS seconds,
               coalesce(server_s, greatest(0, extract(epoch FROM finished_at - started_at)::float8)) AS server,
               CASE WHEN operational_g IS NOT NULL THEN intensity_g_per_kwh END AS k, operational_g + embodied_g AS g
        FROM settled_calls WHERE chunk = ANY(wanted)
    ) AS c
    GROUP BY 1, 2
)
SELECT hour, purpose, model, grp, task, pool, level, zone, policy_version, decision_source, distribution,
       sum(calls)::bigint, min(first_s), max(last_s), sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint,
       sum(processing_s), sum(server_s), sum(energy_j), sum(embodied_g), sum(energy_energy), sum(server_server),
       sum(energy_server), sum(priced)::bigint, sum(intensity), sum(intensity_intensity), sum(energy_intensity),
       sum(operational_g), sum(total_g), sum(total_total), sum(total_intensity), sum(unpriced_j)
FROM sums JOIN dimensions ON dimensions.id = sums.dimension
GROUP BY hour, purpose, model, grp, task, pool, level, zone, policy_version, decision_source, distribution
$$;

-- What some chunks add to call_starts.
CREATE FUNCTION start_sums(wanted bigint[]) RETURNS SETOF call_starts LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
WITH sums AS (
    SELECT date_bin('150 seconds', started_at, 'epoch') AS at, dimension, count(*) AS calls,
           sum(completion_tokens::bigint) AS completion_tokens,
           sum(greatest(0, extract(epoch FROM finished_at - started_at)::float8)) AS processing_s
    FROM settled_calls WHERE chunk = ANY(wanted) GROUP BY 1, 2
)
SELECT at, purpose, pool, level, decision_source, sum(calls)::bigint, sum(completion_tokens)::bigint, sum(processing_s)
FROM sums JOIN dimensions ON dimensions.id = sums.dimension
GROUP BY at, purpose, pool, level, decision_source
$$;

-- What some chunks add to histograms.
CREATE FUNCTION histogram_sums(wanted bigint[]) RETURNS SETOF histograms LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
WITH wanted_dimensions AS (
    SELECT id, pool, grp, level, coalesce(decision_source, '') AS source FROM dimensions WHERE purpose = 'request'
), timed AS (
    SELECT date_trunc('hour', started_at, 'UTC') AS hour, dimension, completion_tokens,
           1000 * extract(epoch FROM first_token_at - started_at)::float8 AS ttft,
           CASE WHEN completion_tokens > 1
                THEN 1000 * extract(epoch FROM finished_at - first_token_at)::float8 / (completion_tokens - 1)
           END AS tpot
    FROM settled_calls WHERE chunk = ANY(wanted)
), sums AS (
    SELECT hour, dimension, 'ttft' AS kind, ttft AS value FROM timed
    UNION ALL SELECT hour, dimension, 'tpot', tpot FROM timed
    UNION ALL SELECT hour, dimension, 'tokens', completion_tokens FROM timed
), counted AS (
    SELECT hour, dimension, kind, floor(ln(greatest(value, 1e-6)) / ln(1.05::float8))::int AS bucket, count(*) AS calls
    FROM sums WHERE value IS NOT NULL GROUP BY 1, 2, 3, 4
)
SELECT CASE WHEN kind = 'tokens' THEN date_trunc('day', hour, 'UTC') ELSE hour END, kind,
       CASE WHEN kind = 'tokens' THEN grp ELSE pool END AS name, source = 'switchback' AS in_block, bucket,
       sum(calls)::bigint
FROM counted JOIN wanted_dimensions ON id = dimension
WHERE kind <> 'tokens' OR (level = 'L0' AND source <> 'forced')
GROUP BY 1, 2, 3, 4, 5
$$;

-- What some chunks add to hourly_evaluations.
CREATE FUNCTION evaluation_sums(wanted bigint[]) RETURNS SETOF hourly_evaluations LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
SELECT evaluation_id, date_trunc('hour', started_at, 'UTC'), count(*), sum(energy_j),
       coalesce(sum(operational_g + embodied_g), 0)
FROM settled_calls JOIN dimensions ON dimensions.id = dimension
WHERE chunk = ANY(wanted) AND purpose <> 'request' AND evaluation_id IS NOT NULL
GROUP BY 1, 2
$$;

-- What intervals that start from one time to another add to meter_sums.
CREATE FUNCTION interval_sums(since timestamptz, until timestamptz) RETURNS SETOF meter_sums LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
SELECT endpoint, to_timestamp(300 * cell), pool, zone, sum(metered_j * share), sum(attributed_j * share),
       sum(idle_j * share), sum(unattributed_j * share),
       coalesce(sum(metered_j * share) FILTER (WHERE calls = 0), 0), sum(length * share),
       sum(share * coalesce(length - idle_s, CASE WHEN calls > 0 THEN length ELSE 0 END)),
       coalesce(sum(idle_s * share), 0), bool_or(restarted OR coalesce(stalled, false))
FROM (
    SELECT *, (least(upto, (cell + 1) * 300.0) - greatest(begin, cell * 300.0)) / length AS share
    FROM (
        SELECT *, upto - begin AS length FROM (
            SELECT *, extract(epoch FROM started_at)::float8 AS begin, extract(epoch FROM finished_at)::float8 AS upto
            FROM intervals WHERE started_at >= since AND started_at < until
        ) AS one
    ) AS timed
    CROSS JOIN LATERAL generate_series(floor(begin / 300.0)::bigint, ceil(upto / 300.0)::bigint - 1) AS cell
    WHERE length > 0
) AS part
GROUP BY 1, 2, 3, 4
$$;

-- The roll-ups with what was settled since.
CREATE VIEW all_hourly_calls AS
    SELECT * FROM hourly_calls
    UNION ALL SELECT * FROM hourly_sums(ARRAY(SELECT chunk FROM chunks WHERE NOT rolled_up));
CREATE VIEW all_call_starts AS
    SELECT * FROM call_starts
    UNION ALL SELECT * FROM start_sums(ARRAY(SELECT chunk FROM chunks WHERE NOT rolled_up));
CREATE VIEW all_histograms AS
    SELECT * FROM histograms
    UNION ALL SELECT * FROM histogram_sums(ARRAY(SELECT chunk FROM chunks WHERE NOT rolled_up));
CREATE VIEW all_hourly_evaluations AS
    SELECT * FROM hourly_evaluations
    UNION ALL SELECT * FROM evaluation_sums(ARRAY(SELECT chunk FROM chunks WHERE NOT rolled_up));
