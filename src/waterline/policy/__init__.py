"""Every decision, pure: arithmetic on numbers that are handed in.

No clock, no dice, no I/O, and no other module of ours: that is what lets the rehearsal and the gateway run the very
same lines. Time and randomness come in as arguments; what must be remembered lives with the caller, in arrays whose
shapes each module documents; every answer comes with the rule it was made by (`decisions.RULES`).

| clock | module | decides |
| --- | --- | --- |
| milliseconds | `admission` | who is taken in, who is refused until when, whose turn it is |
| milliseconds | `routing` | which replica serves |
| milliseconds | `dispatch` | the two together, for all models of a fleet |
| seconds | `effort` | how long a request may think |
| minutes | `forecast` | what the load will be when a replica that starts now is ready |
| minutes | `lending` | which replicas start and stop, on whose GPUs (with `holdings`, `tally`, `takeover`, `claims`) |
| minutes | `tide` | all of the minutes: from what is asked to moves and their log |

`decisions` keeps the log, `jit` compiles where numba is installed.
"""
