"""Pipelines of the package: `pipeline("ehr-risk")`."""
