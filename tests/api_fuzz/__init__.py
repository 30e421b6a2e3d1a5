"""Requests made of the OpenAPI document, by Schemathesis."""
