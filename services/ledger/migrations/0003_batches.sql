-- A call's share of its server's time, and the decode steps that it took part in, up to accounted_until; server_s is null
-- where an earlier version did not count it.
ALTER TABLE calls ADD COLUMN server_s float8;
ALTER TABLE calls ADD COLUMN steps float8 NOT NULL DEFAULT 0;
-- Tokens that all calls generated in these steps.
ALTER TABLE calls ADD COLUMN batch_tokens float8 NOT NULL DEFAULT 0;

-- Time without a call. With the calls' server_s it sums to the length of the intervals. Null: not counted.
ALTER TABLE intervals ADD COLUMN idle_s float8;
-- The meter stood still while tokens were generated.
ALTER TABLE intervals ADD COLUMN stalled bool;

-- Null: the call was charged for processing_s.
ALTER TABLE footprints ADD COLUMN server_s float8;

-- Sums that the power and speed of every endpoint by batch size are computed from.
CREATE TABLE curves (
    endpoint text PRIMARY KEY,
    state jsonb NOT NULL
);
