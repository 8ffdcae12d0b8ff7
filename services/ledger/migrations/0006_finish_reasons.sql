-- Why the answers of a dimension's calls ended; null in the evaluator's calls and those of earlier versions. Only the hash
-- of an earlier version's dimensions leaves it out, so both can run at once.
ALTER TABLE dimensions ADD COLUMN finish_reason text;
