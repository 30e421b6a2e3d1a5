"""The served models: their versions, the loading of one, and the repository that says which are served."""
