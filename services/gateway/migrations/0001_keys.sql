-- API keys. A key has 256 random bits, so that its plain SHA-256 cannot be reversed.
CREATE TABLE api_keys (
    id text PRIMARY KEY,
    hash bytea NOT NULL UNIQUE,
    name text NOT NULL,
    tenant text,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz
);
