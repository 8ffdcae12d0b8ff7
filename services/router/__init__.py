"""The router: draws a directive for every request, sends it to a model server, and publishes the response."""
