-- A request is identified by its record; `id` is the record, or the request id in samples of an earlier router.
ALTER TABLE reservoir ADD COLUMN id text;
UPDATE reservoir SET id = request_id;
ALTER TABLE reservoir ALTER COLUMN id SET NOT NULL, DROP CONSTRAINT reservoir_pkey, ADD PRIMARY KEY (model, id);

ALTER TABLE judged ADD COLUMN id text;
UPDATE judged SET id = request_id;
ALTER TABLE judged ALTER COLUMN id SET NOT NULL, DROP CONSTRAINT judged_pkey, ADD PRIMARY KEY (model, id);
