"""A router with surroundings of its own: fleet, model server, traffic. For tests and drills, never for production."""
