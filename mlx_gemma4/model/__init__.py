"""The network, without state or sampling."""
