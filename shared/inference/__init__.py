"""Clients of model servers: pools of endpoints, attempts, chat templates."""
