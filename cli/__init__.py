"""The `sprout` command."""
