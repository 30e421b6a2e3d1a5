"""Requests generated from the OpenAPI document by Schemathesis."""
