"""Tools that run: functions, servers of the Model Context Protocol, skills."""
