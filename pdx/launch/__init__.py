"""Starts and ends the processes of pdx on one host. Start with `supervise`; `serve` and `up` say what is started."""
