-- A footprint is identified by its request's record; by the request id in messages of an earlier ledger.
ALTER TABLE counted RENAME COLUMN request_id TO id;
