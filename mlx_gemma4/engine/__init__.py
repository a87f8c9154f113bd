"""The rooms joined: a request to a reply."""
