"""A model over HTTP: the API, the web page, and what protects both."""
