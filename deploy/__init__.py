"""Everything that runs Sprout somewhere: the local stack, model servers, images."""
