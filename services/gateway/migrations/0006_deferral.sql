-- Whether the lines of batches wait for a new budget where a spent one refuses requests.
ALTER TABLE limits ADD COLUMN defer_batches boolean NOT NULL DEFAULT false;
-- A batch that waits for a budget is not taken before this time.
ALTER TABLE batches ADD COLUMN deferred_until_wall timestamptz;
