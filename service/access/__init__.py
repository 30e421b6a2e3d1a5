"""Access control: API keys and JWTs of tenants, tickets, TLS, quotas, and the allowed hosts and web pages."""
