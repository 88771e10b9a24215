"""Real servers for the tests, all of them private.

Each has its own directory, listens on loopback ports of its own, is watched by polling with a
deadline, and is stopped by its process id. Nothing here reads or writes /etc/postfix,
/etc/sasldb2 or a system service. Most are context managers: start on entry, stop on exit.
"""
