"""Who may do what: API keys, each of one tenant; whose a session is; which hosts and web pages are answered."""
