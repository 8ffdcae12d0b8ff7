-- Files of clients and of batches, in parts of at most 1 MiB; `bytes` is null until a file is complete.
-- `owner` is the tenant of the API key, or the key if it has no tenant.
CREATE TABLE files (
    id text PRIMARY KEY,
    owner text NOT NULL,
    tenant text,
    filename text NOT NULL,
    purpose text NOT NULL,
    bytes bigint,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX files_by_owner ON files (owner, created_at, id);
CREATE INDEX files_by_expiry ON files (expires_at);

CREATE TABLE file_chunks (
    file_id text NOT NULL REFERENCES files ON DELETE CASCADE,
    number integer NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (file_id, number)
);

-- One gateway works on a batch at a time: `holder`, until `lease_until` (wall time).
CREATE TABLE batches (
    id text PRIMARY KEY,
    owner text NOT NULL,
    key_id text NOT NULL,
    tenant text,
    endpoint text NOT NULL,
    input_file_id text NOT NULL,
    completion_window text NOT NULL,
    metadata text,
    output_expires_s integer,
    status text NOT NULL,
    problem text,
    total integer NOT NULL DEFAULT 0,
    completed integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    output_file_id text,
    error_file_id text,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    in_progress_at timestamptz,
    finalizing_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    expired_at timestamptz,
    cancelling_at timestamptz,
    cancelled_at timestamptz,
    holder text,
    lease_until timestamptz
);
CREATE INDEX batches_by_owner ON batches (owner, created_at, id);
CREATE INDEX active_batches ON batches (created_at)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- The results of a batch until its files are written. The primary key keeps the first result of a line.
CREATE TABLE batch_results (
    batch_id text NOT NULL REFERENCES batches ON DELETE CASCADE,
    line integer NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('completed', 'failed', 'unfinished')),
    document text NOT NULL,
    PRIMARY KEY (batch_id, line)
);
