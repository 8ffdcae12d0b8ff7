-- Tenant of each sample and judged prompt, so that they can be erased with it. Null: none, or stored by an earlier release.
ALTER TABLE reservoir ADD COLUMN tenant text;
ALTER TABLE judged ADD COLUMN tenant text;
