"""optimizer: solves the linear program and publishes the policy."""
