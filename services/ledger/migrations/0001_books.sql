-- Calls on model servers, from responses and usage records.
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
    -- The call's share of the endpoint's intervals that were settled while the call was known, up to accounted_until.
    energy_j float8 NOT NULL DEFAULT 0,
    accounted_until timestamptz,
    -- Some of its energy is missing in energy_j: the call arrived late, or started before the endpoint was metered.
    partial bool NOT NULL DEFAULT false,
    settled bool NOT NULL DEFAULT false
);
CREATE INDEX calls_unsettled ON calls (endpoint, started_at) WHERE NOT settled;
CREATE INDEX calls_by_end ON calls (finished_at);

-- Rejected requests: responses with an error.
CREATE TABLE refusals (
    request_id text PRIMARY KEY,
    model text NOT NULL,
    code text NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX refusals_by_time ON refusals (at);

-- Readings of the energy counters; joules since the server's start.
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
    -- A counter was reset within the interval: the energy between the last reading and the reset is lost.
    restarted bool NOT NULL DEFAULT false,
    -- Number of calls that ran in it and were known when it was settled.
    calls int NOT NULL DEFAULT 0,
    PRIMARY KEY (endpoint, started_at)
);
CREATE INDEX intervals_by_end ON intervals (endpoint, finished_at);

-- The end of the last settled interval of every endpoint, and the idle power learned from intervals without calls.
CREATE TABLE meters (
    endpoint text PRIMARY KEY,
    metered_from timestamptz NOT NULL,
    settled_until timestamptz NOT NULL,
    idle_power_w float8,
    -- Duration and energy of the current span without calls.
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
    -- Some of the energy is missing: in the accounts, but never published.
    partial bool NOT NULL DEFAULT false,
    published bool NOT NULL DEFAULT false
);
CREATE INDEX footprints_unpublished ON footprints (finished_at) WHERE NOT published AND NOT partial;
CREATE INDEX footprints_by_start ON footprints (started_at);
CREATE INDEX footprints_by_evaluation ON footprints (evaluation_id) WHERE evaluation_id IS NOT NULL;

-- Carbon intensity of the grid; a value holds from its time until the next one.
CREATE TABLE intensity (
    zone text NOT NULL,
    at timestamptz NOT NULL,
    intensity_g_per_kwh float8 NOT NULL,
    estimated bool NOT NULL,
    source text NOT NULL,
    PRIMARY KEY (zone, at)
);

-- Every published policy; the report compares requests with its reference option.
CREATE TABLE policies (
    model text NOT NULL,
    version int NOT NULL,
    created_at timestamptz NOT NULL,
    policy jsonb NOT NULL,
    PRIMARY KEY (model, version, created_at)
);

-- Results of the evaluations.
CREATE TABLE quality (
    evaluation_id text PRIMARY KEY,
    model text NOT NULL,
    evaluated_at timestamptz NOT NULL,
    quality jsonb NOT NULL
);
