"""The router: draws a directive for every request, has a model answer it, and publishes the answer."""
