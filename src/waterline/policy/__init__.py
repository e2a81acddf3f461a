"""Every decision, pure: arithmetic on numbers that are handed in.

No clock, no dice, no I/O, and no other module of ours: that is what lets the rehearsal and the gateway run the very
same lines.
"""
