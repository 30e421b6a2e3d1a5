"""The servers themselves, one a file, run in environments of their own: `python -m ... PORT FOLDER NAME=MODEL ...`."""
