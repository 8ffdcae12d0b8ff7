-- Keyed hash of each judged conversation: verdicts on the same one are not independent. Empty: stored by an earlier release.
ALTER TABLE judged ADD COLUMN prompt_hash text NOT NULL DEFAULT '';
