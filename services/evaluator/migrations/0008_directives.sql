-- By level, a hash of the directive's text that was judged. Empty: stored by an earlier release.
ALTER TABLE judged ADD COLUMN directives jsonb NOT NULL DEFAULT '{}';
