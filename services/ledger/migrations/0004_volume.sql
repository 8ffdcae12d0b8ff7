-- Only adds: a ledger of an earlier version that still runs can write calls and refusals as before. Nothing existing is
-- rewritten, so this takes milliseconds whatever the size of the tables.

-- What many calls have in common; calls refer to it by id.
CREATE TABLE dimensions (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- MD5 of the columns below; unique.
    digest uuid NOT NULL UNIQUE,
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
    -- End of the latest call that used it, to the hour.
    used_at timestamptz NOT NULL
);

-- Calls that are not settled yet; the table `calls` is written by earlier versions only.
CREATE TABLE open_calls (
    -- The request's record, which no producer chooses; the request's or usage record's id where there is none.
    id text COLLATE "C" PRIMARY KEY,
    -- Null: the same as id.
    request_id text,
    dimension int NOT NULL,
    endpoint text COLLATE "C" NOT NULL,
    started_at timestamptz NOT NULL,
    first_token_at timestamptz,
    finished_at timestamptz NOT NULL,
    prompt_tokens int,
    completion_tokens int NOT NULL,
    -- As in `calls`; null until intervals in which the call ran were settled.
    energy_j float8,
    server_s float8,
    steps float8,
    batch_tokens float8,
    accounted_until timestamptz,
    partial bool NOT NULL DEFAULT false
) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.2);
CREATE INDEX open_calls_by_start ON open_calls (endpoint, started_at);

-- Energy and carbon of every settled call; a partition by day, which is dropped after the retention of rows.
CREATE TABLE settled_calls (
    id text COLLATE "C" NOT NULL,
    request_id text,
    chunk bigint NOT NULL,
    dimension int NOT NULL,
    started_at timestamptz NOT NULL,
    first_token_at timestamptz,
    finished_at timestamptz NOT NULL,
    prompt_tokens int,
    completion_tokens int NOT NULL,
    energy_j float8 NOT NULL,
    server_s float8,
    intensity_g_per_kwh float8,
    operational_g float8,
    embodied_g float8 NOT NULL,
    partial bool NOT NULL
) PARTITION BY RANGE (finished_at);
CREATE INDEX settled_calls_by_id ON settled_calls (id);
CREATE INDEX settled_calls_by_chunk ON settled_calls (chunk);

-- Settled calls that are still to be published, or to be added to the roll-ups: an outbox of whole chunks.
CREATE TABLE chunks (
    chunk bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    calls int NOT NULL,
    first_finished_at timestamptz NOT NULL,
    last_finished_at timestamptz NOT NULL,
    published bool NOT NULL DEFAULT false,
    rolled_up bool NOT NULL DEFAULT false
);

-- Rejected requests; the table `refusals` is written by earlier versions only.
CREATE TABLE rejections (
    id text COLLATE "C" PRIMARY KEY,
    request_id text,
    model text NOT NULL,
    code text NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX rejections_by_time ON rejections (at);

-- Computed between two readings by the work in each part, because too many calls ran between them for one transaction.
ALTER TABLE readings ADD COLUMN divided bool;
-- A counter was reset between the readings that this one divides.
ALTER TABLE readings ADD COLUMN restarted bool;
