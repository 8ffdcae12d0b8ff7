"""Trial of candidate directives: what they save and cost for one model (`sprout directives try`)."""
