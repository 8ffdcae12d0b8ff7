-- Calls on model servers, as responses and usage records told them.
CREATE TABLE calls (
    id text PRIMARY KEY,
    purpose text NOT NULL,
    evaluation_id text,
    model text NOT NULL,
    grp text NOT NULL,
    task text,
    tenant text,
    pool text NOT NULL,
    level text NOT NULL,
    zone text NOT NULL,
    endpoint text NOT NULL,
    policy_version int,
    decision_source text,
    propensity float8 NOT NULL,
    propensities jsonb NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL,
    first_token_at timestamptz,
    finished_at timestamptz NOT NULL,
    prompt_tokens int,
    completion_tokens int NOT NULL,
    -- Energy from the intervals of the endpoint that were settled while the call was known, up to accounted_until.
    energy_j float8 NOT NULL DEFAULT 0,
    accounted_until timestamptz,
    -- Some of its energy is not in energy_j: it came late, or began before the endpoint was metered.
    partial bool NOT NULL DEFAULT false,
    settled bool NOT NULL DEFAULT false
);
CREATE INDEX calls_unsettled ON calls (endpoint, started_at) WHERE NOT settled;
CREATE INDEX calls_by_end ON calls (finished_at);

-- Responses with an error.
CREATE TABLE refusals (
    request_id text PRIMARY KEY,
    model text NOT NULL,
    code text NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX refusals_by_time ON refusals (at);

-- Energy counters as they were read; joules since the server's start.
CREATE TABLE readings (
    endpoint text NOT NULL,
    at timestamptz NOT NULL,
    gpu text NOT NULL,
    energy_j float8 NOT NULL,
    PRIMARY KEY (endpoint, gpu, at)
);
CREATE INDEX readings_by_endpoint ON readings (endpoint, at);
CREATE INDEX readings_by_time ON readings (at);

-- Settled intervals between two readings; metered_j = attributed_j + idle_j + unattributed_j.
CREATE TABLE intervals (
    endpoint text NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    zone text NOT NULL,
    pool text NOT NULL,
    metered_j float8 NOT NULL,
    attributed_j float8 NOT NULL,
    idle_j float8 NOT NULL,
    unattributed_j float8 NOT NULL,
    -- The counter began anew within it: what was counted before that is lost.
    restarted bool NOT NULL DEFAULT false,
    -- Calls that ran in it, as known when it was settled.
    calls int NOT NULL DEFAULT 0,
    PRIMARY KEY (endpoint, started_at)
);
CREATE INDEX intervals_by_end ON intervals (endpoint, finished_at);

-- How far the books of an endpoint are, and the idle power learned from its quiet intervals.
CREATE TABLE meters (
    endpoint text PRIMARY KEY,
    metered_from timestamptz NOT NULL,
    settled_until timestamptz NOT NULL,
    idle_power_w float8,
    -- The quiet span that is being watched.
    quiet_s float8 NOT NULL DEFAULT 0,
    quiet_j float8 NOT NULL DEFAULT 0
);

-- Energy and carbon of every settled call; the columns of the message Footprint.
CREATE TABLE footprints (
    request_id text PRIMARY KEY,
    purpose text NOT NULL,
    evaluation_id text,
    model text NOT NULL,
    grp text NOT NULL,
    task text,
    tenant text,
    pool text NOT NULL,
    level text NOT NULL,
    zone text NOT NULL,
    endpoint text NOT NULL,
    policy_version int,
    decision_source text,
    propensity float8 NOT NULL,
    propensities jsonb NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    processing_s float8 NOT NULL,
    prompt_tokens int,
    completion_tokens int NOT NULL,
    energy_j float8 NOT NULL,
    intensity_g_per_kwh float8,
    operational_g float8,
    embodied_g float8 NOT NULL,
    total_g float8,
    -- Some of the energy is missing: kept for the books, never published.
    partial bool NOT NULL DEFAULT false,
    published bool NOT NULL DEFAULT false
);
CREATE INDEX footprints_unpublished ON footprints (finished_at) WHERE NOT published AND NOT partial;
CREATE INDEX footprints_by_start ON footprints (started_at);
CREATE INDEX footprints_by_evaluation ON footprints (evaluation_id) WHERE evaluation_id IS NOT NULL;

-- What the grid emitted; a value holds from its instant until the next one.
CREATE TABLE intensity (
    zone text NOT NULL,
    at timestamptz NOT NULL,
    intensity_g_per_kwh float8 NOT NULL,
    estimated bool NOT NULL,
    source text NOT NULL,
    PRIMARY KEY (zone, at)
);

-- Every policy that was in force, for the report's comparison.
CREATE TABLE policies (
    model text NOT NULL,
    version int NOT NULL,
    created_at timestamptz NOT NULL,
    policy jsonb NOT NULL,
    PRIMARY KEY (model, version, created_at)
);

-- What the evaluations found.
CREATE TABLE quality (
    evaluation_id text PRIMARY KEY,
    model text NOT NULL,
    evaluated_at timestamptz NOT NULL,
    quality jsonb NOT NULL
);
