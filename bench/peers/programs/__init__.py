"""The peers' servers, one per file, run in their own environments: `python -m ... PORT FOLDER NAME=MODEL ...`."""
